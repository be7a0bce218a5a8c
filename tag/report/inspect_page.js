"use strict";
// One face at a time: accept (a), reject (r), a note (n), back and forth (arrows, space).
// Verdicts are kept in this browser and saved as a file (s).
(() => {
  const cards = [...document.querySelectorAll(".card")];
  const sample = document.getElementById("sample").dataset.sample;
  const key = "tag-inspect-" + sample;
  const note = document.getElementById("note");
  const name = document.getElementById("annotator");
  let state = { annotator: "", verdicts: {} };
  let at = 0;

  try { state = { ...state, ...JSON.parse(localStorage.getItem(key) || "{}") }; } catch { /* a private window */ }
  function keep() {
    try { localStorage.setItem(key, JSON.stringify(state)); } catch { /* the file can still be saved */ }
  }

  const entry = (card) => state.verdicts[card.dataset.id] || { verdict: "", note: "" };
  function change(part) {
    const id = cards[at].dataset.id;
    state.verdicts[id] = { ...entry(cards[at]), ...part };
    if (!state.verdicts[id].verdict && !state.verdicts[id].note) delete state.verdicts[id];
    keep();
  }

  function show() {
    cards.forEach((card, i) => { card.hidden = i !== at; });
    const { verdict, note: text } = entry(cards[at]);
    note.value = text;
    for (const button of document.querySelectorAll("[data-verdict]")) {
      button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
    }
    const judged = Object.values(state.verdicts).filter((v) => v.verdict);
    const accepted = judged.filter((v) => v.verdict === "accept").length;
    document.getElementById("count").textContent =
      `face ${at + 1} of ${cards.length}; ${judged.length} judged, ${accepted} accepted`;
  }

  function go(step) {
    at = Math.min(Math.max(at + step, 0), cards.length - 1);
    show();
  }

  function judge(verdict) {
    change({ verdict: entry(cards[at]).verdict === verdict ? "" : verdict });  // the same again takes it back
    if (entry(cards[at]).verdict) go(1);
    else show();
  }

  function asText() {
    return JSON.stringify({ sample, annotator: state.annotator, verdicts: state.verdicts }, null, 1) + "\n";
  }

  function save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([asText()], { type: "application/json" }));
    link.download = `inspection-${(state.annotator || "anonymous").replace(/[^\w-]+/g, "_")}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === note || event.target === name) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const keys = {
      a: () => judge("accept"), r: () => judge("reject"), n: () => note.focus(), s: save,
      ArrowRight: () => go(1), ArrowLeft: () => go(-1), " ": () => go(1),
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  note.addEventListener("input", () => change({ note: note.value }));
  name.value = state.annotator;
  name.addEventListener("input", () => { state.annotator = name.value; keep(); });
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => judge(button.dataset.verdict));
  }
  document.getElementById("back").addEventListener("click", () => go(-1));
  document.getElementById("next").addEventListener("click", () => go(1));
  document.getElementById("save").addEventListener("click", save);
  window.inspection = { asText };  // for whoever drives the page by script
  show();
})();
