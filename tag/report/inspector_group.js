// One group: the face, its completions token by token, and how reward, advantage and loss came about.
(() => {
  const { run, el, num, fixed, signed } = Inspector;
  const { settings } = run;
  const SPACE = /( +|\t+|\n)/;

  const loss = (v) => (v !== null && Math.abs(v) < 1e-7 ? "0.000000" : signed(v, 6)); // below it is rounding of float32
  const sub = (symbol, i) => [symbol, el("sub", {}, String(i))];

  // ---- a completion: what it answered, its reward, its tokens, its boxes
  function tokenNode(token, boxAt) {
    const node = el("span", { class: "tok", tabindex: "-1", "data-c": token.completion, "data-i": token.index });
    for (const part of token.text.split(SPACE)) {
      if (!part) continue;
      const kind = { " ": "sp", "\t": "tab", "\n": "nl" }[part[0]];
      node.append(kind ? el("i", { class: kind }, part) : part);
    }
    if (token.chip) {
      node.classList.add("chipped");
      node.dataset.chip = token.chip; // drawn by the style sheet: it is not part of the text
    }
    if (boxAt !== undefined) {
      node.classList.add("inbox");
      node.dataset.box = boxAt;
    }
    return node;
  }

  function trace(completion, tokens, c) {
    const boxAt = new Map();
    completion.boxes.forEach((box, b) => {
      if (box.tokens) for (let i = box.tokens[0]; i < box.tokens[1]; i++) boxAt.set(i, b);
    });
    const nodes = tokens.map((token) => tokenNode(token, boxAt.get(token.index)));
    if (nodes.length) nodes[0].tabIndex = 0; // one stop for Tab; arrows go on from there
    const home = el("div", { class: "trace", role: "group", "aria-label": `tokens of completion ${c + 1}` }, ...nodes);
    return completion.text === undefined ? [home] : [home, el("div", { class: "trace whole" }, completion.text)];
  }

  function rewardLine({ rewards: [fmt, ans, au, total] }) {
    const part = (name, value) => el("span", { class: "part" }, el("small", {}, name), value === null ? "–" : num(value));
    return el("p", { class: "parts num" }, part("R_fmt", fmt), "+", part("R_ans", ans), "+", part("R_AU", au), "=",
      el("span", { class: "part total" }, el("small", {}, "R"), num(total)));
  }

  function boxTable(boxes, c) {
    if (!boxes.length) return null;
    const head = ["#", "named", "closest", "IoU", "1:1"].map((name) => el("th", { scope: "col" }, name));
    const rows = boxes.map((box, b) => {
      const bar = el("span", { class: "track" }, el("i"));
      bar.firstChild.style.width = `${100 * box.iou}%`;
      return el("tr", { "data-c": c, "data-box": b, class: box.counted ? "" : "dim" },
        el("td", {}, String(b + 1)), el("td", {}, box.named ?? "–"), el("td", {}, box.au ?? "–"),
        el("td", {}, bar, fixed(box.iou, 2), box.counted ? null : " extra"), el("td", {}, fixed(box.matchedIou, 2)));
    });
    return el("table", { class: "boxes" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
  }

  function card(group, c) {
    const completion = group.completions[c];
    const right = completion.rewards[1] > 0;
    const tokens = Inspector.tokens(group)[c];
    const broken = completion.broken.length
      ? el("div", { class: "broken" }, el("strong", {}, "Format broken"), el("ul", {}, ...completion.broken.map((why) => el("li", {}, why))))
      : null;
    return el("article", { class: "panel card", "data-c": c },
      el("div", { class: "top" },
        el("button", { type: "button", class: "pin", "data-pin": c, "aria-pressed": "false", title: "show its boxes on the face" }, String(c + 1)),
        el("span", { class: `verdict ${right ? "right" : "wrong"}` }, el("span", { class: "sign", "aria-hidden": "true" }, right ? "✓" : "✗"),
          el("span", { class: "sr" }, right ? "right:" : "wrong:"), completion.answer),
        el("span", { class: "adv num", "data-side": completion.advantage < 0 ? "minus" : "plus" }, "A = ", signed(completion.advantage, 2))),
      rewardLine(completion),
      ...trace(completion, tokens, c),
      broken,
      boxTable(completion.boxes, c),
      el("p", { class: "facts num" }, `${tokens.length} tokens · ${completion.finish || "?"} · seed ${completion.seed}`));
  }

  // ---- the arithmetic
  const list = (values, show) => {
    const words = values.map(show);
    return words.length > 16 ? [...words.slice(0, 16), "…"].join(" + ") : words.join(" + ");
  };
  const bracket = (x) => (x < 0 ? `(${num(x)})` : num(x));

  function advantageText(group, step, c) {
    const totals = group.completions.map((completion) => completion.rewards[3]);
    const G = totals.length;
    const mine = group.completions[c];
    const lines = [el("p", {}, "mean = (", list(totals, bracket), `) / ${G} = `, el("b", {}, num(group.mean)))];
    if (step.useStd) lines.push(el("p", {}, `std = √( Σ (R − mean)² / ${G - 1} ) = `, el("b", {}, num(group.std))));
    if (group.flat) lines.push(el("p", {}, "All rewards are equal: every A is 0, the group moves nothing but through KL."));
    else {
      const top = `${num(mine.rewards[3])} − ${bracket(group.mean)}`;
      lines.push(el("p", {}, ...sub("A", c + 1), step.useStd ? ` = (${top}) / ${num(group.std)} = ` : ` = ${top} = `, el("b", {}, signed(mine.advantage))));
    }
    lines.push(el("p", {}, ...sub("R_AU", c + 1), ": ", mine.au));
    return lines;
  }

  function lossText(group, step, c) {
    const { sums } = group;
    const Z = num(step.loss.normaliser, 7);
    const { completions } = group;
    const length = group.lengths[c];
    const weight = { sequence: [` = 1 / (|o| · Z) = 1 / (${length} · ${Z}) = `, `Z = ${Z} completions of the step`],
      token: [` = 1 / Z = 1 / ${Z} = `, `Z = ${Z} tokens of the step`],
      constant: [` = 1 / Z = 1 / ${Z} = `, `Z = completions × ${settings.maxTokens} = ${Z}`] }[settings.loss_average] ?? [" = ", ""];
    const [low, high] = settings.clip;
    const kl = sums.kl_loss ? ` + β·KL` : "";
    return [
      el("p", {}, "loss of a completion = w Σ", el("sub", {}, "t"), ` [ −min( ratio·A, clip(ratio, ${num(low)}, ${num(high)})·A )${kl} ]`),
      el("p", {}, ...sub("w", c + 1), weight[0], el("b", {}, num(completions[c].weight)), ` ; ${weight[1]}`),
      el("p", {}, "this group: policy ", el("b", {}, loss(sums.policy_loss)), " + KL ", el("b", {}, loss(sums.kl_loss)), " = ", el("b", {}, loss(sums.loss))),
      el("p", {}, "step: policy ", loss(step.loss.policy_loss), " + KL ", loss(step.loss.kl_loss), " = ", el("b", {}, loss(step.loss.loss)),
        ` over ${step.numGroups} groups`, ...recordedText(step)),
      step.numGroups > step.groups.length ? el("p", { class: "dim" }, `${step.numGroups - step.groups.length} groups that are not shown: ${loss(step.hidden.loss)}`) : null,
    ];
  }

  function recordedText(step) {
    const { recorded } = step.loss;
    if (!recorded) return [" (the run noted none)"];
    if (recorded.groups === step.numGroups) return [", recorded by the run: ", el("b", {}, loss(recorded.value))];
    return [`; the first ${recorded.groups}, those of the main process: ${loss(recorded.computed)}, recorded `, el("b", {}, loss(recorded.value))];
  }

  function table(group) {
    const names = ["", "R_fmt", "R_ans", "R_AU", "R", "R − mean", "A", "|o|", "1000 w", "policy", "KL", "loss"];
    const row = (kind, cells) => el("tr", {}, ...cells.map((cell, i) => el(i ? kind : "th", i ? {} : { scope: "row" }, cell)));
    const rows = group.completions.map((completion, c) => {
      const [fmt, ans, au, total] = completion.rewards;
      const line = row("td", [String(c + 1), num(fmt), num(ans), au === null ? "–" : fixed(au), fixed(total), signed(total - group.mean), signed(completion.advantage),
        String(group.lengths[c]), fixed(1000 * completion.weight, 4), loss(completion.policy), loss(completion.kl), loss(completion.policy + completion.kl)]);
      line.dataset.c = c;
      return line;
    });
    const last = row("td", ["", "", "", "mean", fixed(group.mean), "std", num(group.std), "", "sum", loss(group.sums.policy_loss), loss(group.sums.kl_loss), loss(group.sums.loss)]);
    return el("div", { class: "scroll" }, el("table", { class: "sums num" },
      el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows), el("tfoot", {}, last)));
  }

  // ---- the step: its groups as tabs, one of them open
  Inspector.groupTabs = (step, open) => el("div", { class: "tabs", role: "group", "aria-label": "Groups of this step" },
    ...step.groups.map((group, g) => {
      const marks = group.completions.map((completion) => el("i", { class: completion.rewards[1] > 0 ? "yes" : "no" }));
      return el("button", { type: "button", class: "tab", "data-group": g, "aria-pressed": String(g === open), title: group.face.id },
        Inspector.picture(group.face, 44),
        el("span", {}, el("b", {}, group.face.label), el("span", { class: "marks", "aria-hidden": "true" }, ...marks),
          el("small", {}, [group.kind, group.flat ? "flat" : "", group.face.aus.length ? "" : "no AU boxes"].filter(Boolean).join(" · "))));
    }));

  Inspector.groupView = (step, g) => {
    const group = step.groups[g];
    const { face } = group;
    const aus = face.aus.map(([name, score]) => `${name} ${fixed(score, 2)}`).join(", ");
    return el("section", { "data-group": g, "aria-label": `Group ${g + 1}` },
      el("div", { class: "group" },
        el("aside", { class: "side" },
          el("div", { class: "panel" },
            el("div", { class: "face", id: "face" }, Inspector.picture(face, 224)),
            el("p", { class: "truth" }, "truth: ", el("b", {}, face.label)),
            el("p", { class: "facts" }, aus ? `detector: ${aus}` : "the detector activated no AU: R_AU is absent here"),
            el("p", { class: "facts id" }, face.id),
            el("p", { class: "about", id: "about" }))),
        el("div", { class: "cards" }, ...group.completions.map((_, c) => card(group, c)))),
      el("div", { class: "panel arithmetic" },
        el("h3", {}, "The arithmetic of this group"), table(group),
        el("div", { class: "formulas num" }, el("div", { id: "advantage-text" }), el("div", { id: "loss-text" }))));
  };

  // The formulas spelled out for completion c.
  Inspector.spellOut = (step, g, c) => {
    document.getElementById("advantage-text").replaceChildren(...advantageText(step.groups[g], step, c));
    document.getElementById("loss-text").replaceChildren(...lossText(step.groups[g], step, c).filter(Boolean));
  };

  // All numbers of a token, for the panel beside it.
  Inspector.tokenNumbers = (token, count) => {
    const probability = Math.exp(token.logprob);
    const row = (name, ...value) => [el("dt", {}, name), el("dd", { class: "num" }, ...value)];
    const shown = token.text ? JSON.stringify(token.text).slice(1, -1).replaceAll('\\"', '"') : token.chip;
    return [
      el("p", { class: "what" }, el("code", {}, shown), el("span", { class: "dim num" }, ` id ${token.id}, token ${token.index + 1} of ${count}, completion ${token.completion + 1}`)),
      el("dl", {},
        ...row("log-prob now", num(token.logprob), el("small", {}, ` p = ${num(probability, 3)}`)),
        ...row("when scored (old)", num(token.old)),
        ...row("when sampled", num(token.sampled)),
        ...row("sampled − scored", num(token.mismatch, 3)),
        ...row("under the reference", num(token.ref)),
        ...row("ratio π / π_old", num(token.ratio, 5), token.clipped ? el("strong", {}, " clipped") : el("small", {}, " not clipped")),
        ...row(`KL (${settings.kl_estimator})`, num(token.kl)),
        ...row("entropy", num(token.entropy)),
        ...row("advantage", signed(token.advantage)),
        ...row("term of the loss", num(token.term)),
        ...row("  = policy + KL", el("small", {}, `${num(token.policyTerm, 3)} + ${num(token.klTerm, 3)}`))),
    ];
  };
})();
