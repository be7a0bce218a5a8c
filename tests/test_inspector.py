"""What the rollout inspector computes: the text of single tokens, and the loss taken apart as tag.grpo put it together.

pytest tests/test_inspector.py
"""

import json
import random

import pytest
from fake_run import FakeRun
from transformers import AutoTokenizer

from tag.grpo import grpo_loss, loss_normaliser
from tag.record import load_record
from tag.report.inspector_step import au_arithmetic, loss_parts, view_step
from tag.report.pieces import Pieces, token_ranges
from tag.trace import parse
from tag.vlm import TINY_MODEL


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces(AutoTokenizer.from_pretrained(TINY_MODEL))


# ---- tokens


def test_pieces_put_together_are_the_text(pieces):
    text = 'AU12 <bbox>[1, 2]</bbox>. 世界 🙂é\n\n  a <script> " \u202e'
    ids = [*pieces.tokenizer.encode(text), pieces.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    split = pieces.split(ids, text)
    assert "".join(p.text for p in split) == text and len(split) == len(ids)
    assert split[-1] == ("", "<|im_end|>")
    assert [p.chip for p in split if p.chip][:2] == ["E4", "B8"] and "世" in [p.text for p in split]
    assert pieces.split(ids, text + "x") is None
    rng = random.Random(0)
    for _ in range(300):  # halves of characters, special tokens inside them, ids beyond the vocabulary
        ids = [rng.randrange(len(pieces.tokenizer) + 2) for _ in range(rng.randrange(1, 30))]
        assert pieces.split(ids, pieces.tokenizer.decode(ids, skip_special_tokens=True)) is not None


def test_pieces_of_a_tokenizer_that_is_not_byte_level():
    pieces = Pieces(AutoTokenizer.from_pretrained(TINY_MODEL))
    pieces.byte_level = False  # found by decoding longer and longer beginnings
    text = "AU12 世界 🙂é <answer>fear"
    ids = pieces.tokenizer.encode(text)
    assert "".join(p.text for p in pieces.split(ids, text)) == text
    assert pieces.split(ids[1:], text) is None


def test_box_spans_become_tokens_that_cover_them(pieces):
    text = "AU12 <bbox>[10, 20, 300, 400]</bbox>. AU6:<bbox>[1, 2, 3, 4]</bbox>"
    split = pieces.split(pieces.tokenizer.encode(text), text)
    spans = parse(text).box_spans
    assert len(spans) == 2
    for (first, stop), (begin, end) in zip(token_ranges(split, spans), spans):
        texts = [p.text for p in split[first:stop]]
        assert text[begin:end] in "".join(texts)
        assert not any(text[begin:end] in "".join(fewer) for fewer in (texts[1:], texts[:-1]))


# ---- numbers


SETTINGS = [
    {},
    {"loss_average": "token", "ratio_level": "sequence", "clip_eps_high": 0.28},
    {"loss_average": "constant", "kl_estimator": "k1", "no_advantage_std": True},
    {"kl_reference": "old", "kl_estimator": "k2"},
    {"kl_reference": "none", "beta": 0.0},
    {"updates_per_step": 1, "au_reward": "iou-matched"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_groups_add_up_to_the_recorded_loss(synth, tmp_path, settings):
    FakeRun(tmp_path / "run", synth, 1, 1, 3, 4, seed=1, args=settings).write()
    record = load_record(tmp_path / "run" / "records" / "step-000000")
    args, t, mask = record.meta["args"], record.tensors, record.completion_mask
    parts = loss_parts(record)
    recorded = record.meta["loss"]
    for name in ("loss", "policy_loss", "kl_loss"):
        assert float(sum(getattr(p, name) for p in parts.groups)) == pytest.approx(recorded[name], abs=1e-6)
    # Completion by completion by the function that trained, and token by token.
    ref = t["old_logprobs"] if args["kl_reference"] == "old" else t.get("ref_logprobs")
    for n in range(len(mask)):
        one = grpo_loss(
            t["logprobs"][n : n + 1],
            t["old_logprobs"][n : n + 1],
            t["advantages"][n : n + 1],
            mask[n : n + 1],
            ref_logprobs=None if ref is None else ref[n : n + 1],
            **{
                k: args[k] for k in ("clip_eps", "clip_eps_high", "beta", "kl_estimator", "loss_average", "ratio_level")
            },
            normaliser=loss_normaliser(mask, args["loss_average"], args["max_new_tokens"]),
        )
        assert float(parts.policy[n]) == pytest.approx(float(one.policy_loss), abs=1e-6)
        assert float(parts.kl[n]) == pytest.approx(float(one.kl_loss), abs=1e-6)
    view = view_step(record, None, lambda face, digest: (None, "not asked for"), max_groups=0)
    json.dumps(view.data, allow_nan=False)
    assert view.data["notes"] == []
    shown = [c["policy"] + c["kl"] for group in view.data["groups"] for c in group["completions"]]
    assert len(shown) == 12 and sum(shown) == pytest.approx(view.data["loss"]["recorded"]["value"], abs=1e-6)
    hidden = view_step(record, None, lambda face, digest: (None, ""), max_groups=1).data
    assert hidden["groups"][0]["sums"]["loss"] + hidden["hidden"]["loss"] == pytest.approx(recorded["loss"], abs=1e-6)
    assert (view.data["groups"][0]["new"] is None) == (settings.get("updates_per_step") == 1)


def test_a_run_on_two_ranks_is_compared_with_the_share_of_the_first(synth, tmp_path):
    FakeRun(tmp_path / "run", synth, 1, 1, 3, 4, world=2).write()
    record = load_record(tmp_path / "run" / "records" / "step-000000")
    data = view_step(record, None, lambda face, digest: (None, ""), 0).data
    assert data["loss"]["recorded"]["groups"] == 2 and data["notes"] == []
    record.meta["loss"]["loss"] += 1e-3
    record.tensors["advantages"] += 0.01
    assert len(view_step(record, None, lambda face, digest: (None, ""), 0).data["notes"]) == 2


def test_au_reward_is_spelled_out():
    def box(iou: float, counted: bool = True) -> dict:
        return {"iou": iou, "counted": counted, "matched_iou": iou}

    def spelled(boxes: list[dict], value: float, n: int, kind: str = "iou") -> str:
        return au_arithmetic({"boxes": boxes, "rewards": {"au": value}}, n, kind)

    assert spelled([box(0.8), box(0.6)], 0.7, 3) == "mean IoU of all 2 boxes: (0.800 + 0.600) / 2 = 0.700"
    assert "best 1" not in spelled([box(0.8)], 0.8, 1) and spelled([box(0.8)], 0.8, 1).endswith("0.800")
    assert "best 2 of 3" in spelled([box(0.8), box(0.1, False), box(0.6)], 0.7, 2)
    assert spelled([], 0.0, 2).startswith("0: no valid box") and "absent" in spelled([box(0.8)], 0.0, 0)
    assert "max(k, min(n, 3)) = 3" in spelled([box(0.9)], 0.3, 4, "iou-matched")
    assert spelled([box(0.8)], 0.8, 1, "iou-silence").endswith("0.800")
    assert spelled([], 1.0, 0, "iou-silence") == "1: no activated AU on this face, and no box"
