"use strict";
// What the parts of the inspector share: the data, elements, numbers as text, and the colouring of tokens.
// Everything shown comes through text nodes and setAttribute; nothing here or elsewhere parses HTML.
const Inspector = {};
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const parse = (id) => JSON.parse(document.getElementById(id).textContent);
  const run = Inspector.run = parse("run-data");
  const cache = new Map();

  // The data of a recorded step, parsed when it is first looked at.
  Inspector.step = (number) => {
    if (!cache.has(number)) {
      if (cache.size >= 6) cache.clear();
      cache.set(number, parse(`step-${number}`));
    }
    return cache.get(number);
  };

  function make(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }
  Inspector.el = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
  Inspector.svg = (tag, attributes = {}, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

  // ---- numbers as text
  const minus = (text) => text.replace("e+", "e").replaceAll("-", "−");
  Inspector.num = (x, digits = 4) => {
    if (x === null || x === undefined) return "–";
    if (!Number.isFinite(x)) return minus(String(x));
    const size = Math.abs(x);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return minus(x.toExponential(2));
    return minus(String(Number(x.toPrecision(digits))));
  };
  Inspector.fixed = (x, digits = 3) => (x === null || x === undefined ? "–" : minus(x.toFixed(digits)));
  Inspector.signed = (x, digits = 3) => (x > 0 ? "+" : "") + Inspector.fixed(x, digits);
  Inspector.percent = (x) => (x === null || x === undefined ? "–" : `${Math.round(x * 100)} %`);

  // ---- numbers of a group's tokens: base64 of float32 (or uint32), completions end to end
  function unpack(text, kind) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new kind(bytes.buffer);
  }

  // One array of tokens a completion; a token knows every number of it, and where it stands.
  Inspector.tokens = (group) => {
    if (group.tokens) return group.tokens;
    const column = (name) => (typeof group[name] === "string" ? unpack(group[name], Float32Array) : null);
    const ids = unpack(group.ids, Uint32Array);
    const [sampled, old, fresh, ref, entropy, ratio, surrogate, kl] =
      ["sampled", "old", "new", "ref", "entropy", "ratio", "surrogate", "kl"].map(column);
    const clipped = new Set(group.clipped);
    let at = 0;
    group.tokens = group.completions.map((completion, c) => {
      const list = [];
      for (let i = 0; i < group.lengths[c]; i++, at++) {
        const piece = completion.odd ? completion.odd[i] ?? run.vocabulary[ids[at]] : ["", `#${ids[at]}`];
        const [text, chip] = Array.isArray(piece) ? piece : [piece, ""];
        const policy = -(surrogate ? surrogate[at] : completion.advantage) * completion.weight;
        const klTerm = kl ? kl[at] * completion.klWeight : 0;
        list.push({
          id: ids[at], text, chip, index: i, completion: c,
          sampled: sampled[at], old: old[at], logprob: (fresh ?? old)[at], ref: ref ? ref[at] : null,
          entropy: entropy[at], ratio: ratio ? ratio[at] : 1, clipped: clipped.has(at), kl: kl ? kl[at] : null,
          mismatch: sampled[at] - old[at], advantage: completion.advantage,
          policyTerm: policy, klTerm, term: policy + klTerm,
        });
      }
      return list;
    });
    return group.tokens;
  };

  // ---- what tokens can be coloured by. value: what is mapped, on a scale that ends at run.scales[name];
  // kind: two-sided (blue above 0, orange below), one-sided, or a flag; end: the value at a scale's end as text.
  const exp = (x) => Inspector.fixed(Math.exp(x), 2);
  const num = (x) => Inspector.num(x, 2);
  Inspector.quantities = {
    advantage: { name: "advantage", kind: "two", value: (t) => t.advantage, end: num,
      note: "A of the completion: blue is made more likely, orange less" },
    term: { name: "term of the loss", kind: "two", value: (t) => -t.term, end: (x) => num(-x),
      note: "what the token adds to the loss of the step; blue lowers it, orange raises it" },
    ratio: { name: "ratio π / π_old", kind: "two", value: (t) => Math.log(t.ratio), end: exp,
      note: `blue: more likely than when sampled, orange: less; clipped outside ${run.settings.clip.map((v) => Inspector.num(v)).join(" … ")}` },
    clipped: { name: "clipped", kind: "flag", value: (t) => (t.clipped ? 1 : 0), end: () => "clipped",
      note: "tokens whose gradient the clip removed" },
    kl: { name: "KL to the reference", kind: "one", value: (t) => t.kl, end: num,
      note: "per-token estimate; strong: far from the reference" },
    logprob: { name: "log-prob", kind: "one", value: (t) => -t.logprob, end: (x) => num(-x),
      note: "of the policy; strong: an unlikely token" },
    entropy: { name: "entropy", kind: "one", value: (t) => t.entropy, end: num,
      note: "of the policy where it wrote the token, in nats; strong: undecided" },
    mismatch: { name: "sampled − scored", kind: "two", value: (t) => t.mismatch, end: num,
      note: "log-prob in the rollout engine minus log-prob in the trainer: should be rounding noise" },
    none: { name: "nothing", kind: "none", value: () => 0, end: () => "", note: "plain text" },
  };
  if (run.settings.kl_estimator === "k1") Inspector.quantities.kl.kind = "two"; // k1 can be negative
  if (!("kl" in run.scales)) delete Inspector.quantities.kl;

  Inspector.paint = (node, token, name) => {
    const { kind, value } = Inspector.quantities[name];
    const end = kind === "flag" ? 1 : run.scales[name] || 0;
    const x = value(token);
    const share = end > 0 && Number.isFinite(x) ? Math.max(-1, Math.min(1, x / end)) : 0;
    node.dataset.side = kind === "one" ? "one" : kind === "flag" ? "flag" : share < 0 ? "minus" : "plus";
    node.classList.toggle("cut", kind === "flag" && x === 1);
    node.classList.toggle("odd", x !== null && !Number.isFinite(x));
    node.style.setProperty("--v", Math.abs(share).toFixed(3));
  };

  Inspector.legend = (node, name) => {
    const { kind, end, note } = Inspector.quantities[name];
    const { el } = Inspector;
    const scale = run.scales[name] || 0;
    let parts = [];
    if (kind === "flag") parts = [el("i", { class: "swatch flag" }), el("span", {}, "clipped")];
    else if (kind !== "none" && !scale) parts = [el("span", {}, "0 on every token shown")];
    else if (kind === "one") parts = [el("span", {}, "0"), el("i", { class: "ramp one" }), el("span", {}, `${end(scale)} and beyond`)];
    else if (kind === "two") {
      parts = [el("span", {}, end(-scale)), el("i", { class: "ramp two" }), el("span", {}, `${end(scale)} and beyond`)];
    }
    node.replaceChildren(el("b", { class: "print" }, `coloured by ${Inspector.quantities[name].name}`), el("span", { class: "scale num" }, ...parts), el("span", { class: "dim" }, note));
  };
})();
