"""One set of a blind preference study as a page for raters: a single file without network.

Answers stay in the rater's browser until they are saved as a file and sent back. The page holds the faces: it must be
handled as the data set is. Of each pair it holds a token, one image, and two responses as A and B; nothing else.
"""

from collections.abc import Callable, Mapping

from PIL import Image

from tag.boxes import Canvas
from tag.data.records import Record
from tag.preference.pairs import Pair, shown_text
from tag.preference.rubric import CRITERIA
from tag.preference.study import Item, Study
from tag.report.face_html import blind_face_svg, blind_trace_html
from tag.report.page import esc, html_page, image_uri, resource
from tag.trace import parse

IMAGE_SIZE = 448  # pixels of the square face
# For people, who need no boxes' coordinates explained: the rubric's three questions in everyday words.
QUESTIONS = dict(
    zip(
        CRITERIA,
        (
            ("Is it true of this face?", "What it says can be seen, and no telling sign is left out."),
            ("Does it point at the right places?", "Movements are named rightly and the boxes lie where they happen."),
            ("Does it make sense?", "The answer follows from the signs that are listed."),
        ),
    )
)


def study_page(
    study: Study,
    number: int,
    pairs: Mapping[str, Pair],
    load_image: Callable[[Record], Image.Image],
    title: str,
) -> str:
    """The page of set `number`. pairs: by id. Raises DataError for an image that cannot be read."""
    items = study.sets[number]
    cards = "".join(_template(item, pairs[item.id], load_image) for item in items)
    questions = "".join(f"<li><b>{question}</b> {text}</li>" for question, text in QUESTIONS.values())
    body = _BODY.format(
        title=esc(title),
        study=esc(study.id),
        number=number,
        seal=esc(study.seal(number)),
        count=len(items),
        questions=questions,
        cards=cards,
    )
    style = resource("base.css") + resource("study_page.css")
    return html_page(title, body, style, resource("study_page.js"))


def _template(item: Item, pair: Pair, load_image: Callable[[Record], Image.Image]) -> str:
    image = load_image(pair.record)
    uri = image_uri(Canvas(*image.size).letterbox(image, IMAGE_SIZE))
    shown = [pair.predictions[item.a].text, pair.predictions[1 - item.a].text]
    # The face is in the file once: the script hands it to B.
    sources = [f'src="{uri}"', ""]
    responses = "".join(map(_response, "AB", shown, sources))
    return f'<template data-token="{esc(item.token)}">{responses}</template>'


def _response(side: str, text: str, source: str) -> str:
    trace = parse(shown_text(text))
    return (
        f'<article class="panel response" data-side="{side}" aria-labelledby="name-{side}">'
        f'<h3 id="name-{side}"><span class="letter" aria-hidden="true">{side}</span>'
        f'<span class="sr">Response {side}</span></h3>'
        f'<div class="face"><img {source} alt="The face, with the boxes of response {side}" '
        f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}">{blind_face_svg(trace)}</div>'
        f'<div class="trace">{blind_trace_html(trace)}</div></article>'
    )


_BODY = """<div id="study" data-study="{study}" data-set="{number}" data-seal="{seal}">
<header class="top">
<div class="who"><strong>{title}</strong><span class="dim" id="rater-shown"></span></div>
<div class="progress" id="progress" hidden><progress id="meter" max="{count}" value="0" aria-label="pairs judged">
</progress><span id="count" class="num" role="status"></span></div>
<div class="tools"><button class="button" id="save" type="button" hidden><span class="long">Save result file</span>
<span class="short">Save</span></button><button class="button" id="theme" type="button">Theme: auto</button></div>
</header>
<p class="panel warn" id="not-kept" hidden>This browser keeps nothing when the page is closed. Save the result file
before you leave.</p>
<main>
<section class="panel page" id="start">
<h1>Which explanation is better?</h1>
<p>You will see {count} faces. For each, two explanations of the expression it shows, A and B, were written by two
different systems. Which is which changes at random from face to face.</p>
<p>Look at the face first. Then say which explanation you would rather rely on. It helps to ask:</p>
<ol class="questions">{questions}</ol>
<p>Numbered boxes on the face are the places that an explanation points at. Length and style are no merits. If you could
not choose, say so: that is an answer, too.</p>
<form id="begin">
<label for="rater">Your rater code</label>
<input id="rater" name="rater" type="text" maxlength="40" required autocomplete="off" autocapitalize="off"
spellcheck="false" aria-describedby="rater-help rater-error">
<p class="dim" id="rater-help">The code that you were given; not your name. Letters, digits, dots and dashes.</p>
<p class="error" id="rater-error" role="alert"></p>
<fieldset><legend>Have you been trained in reading facial expressions (FACS, psychology, clinical or similar)?</legend>
<label class="choice"><input type="radio" name="expert" value="yes" required> Yes</label>
<label class="choice"><input type="radio" name="expert" value="no"> No</label></fieldset>
<button class="button primary" type="submit" id="go">Start</button>
</form>
<p class="dim">Your answers stay in this browser. Nothing is sent anywhere: at the end you save a file and return it to
whoever gave you this page. You can close the page at any time and go on later in the same browser.</p>
</section>
<section id="pair" hidden>
<h2 id="heading" tabindex="-1"></h2>
<div id="stage"></div>
<div class="bar" role="group" aria-label="Which explanation would you rather rely on?">
<button class="pick" type="button" data-choice="A"><b>A</b><span>is better</span></button>
<button class="pick" type="button" data-choice="tie"><b>=</b><span>no difference</span></button>
<button class="pick" type="button" data-choice="B"><b>B</b><span>is better</span></button>
<nav class="moves" aria-label="Pairs"><button class="button" id="back" type="button">← Back</button>
<span class="keys dim" aria-hidden="true"><kbd>A</kbd> <kbd>T</kbd> <kbd>B</kbd> choose · <kbd>←</kbd> <kbd>→</kbd>
move · <kbd>H</kbd> boxes · <kbd>S</kbd> save</span>
<button class="button" id="boxes" type="button" aria-pressed="false">Hide boxes</button>
<button class="button" id="next" type="button">Next →</button></nav>
</div>
</section>
<section class="panel page" id="end" hidden>
<h2 id="end-heading" tabindex="-1"></h2>
<p id="end-text"></p>
<p class="row"><button class="button primary" id="save-end" type="button">Save result file</button>
<button class="button" id="first-open" type="button">Go to the first open pair</button>
<button class="button" id="review" type="button">Look at the last pair again</button></p>
<p id="saved" role="status"></p>
</section>
</main>
{cards}
</div>"""
