"use strict";
// Filters and sorts the cards, ties boxes on the face to their text, and keeps the view in the address (#true=fear&...).
(() => {
  const grid = document.getElementById("grid");
  const cards = [...grid.querySelectorAll(".card")];
  const form = document.getElementById("filters");
  const controls = form.elements;
  const NAMES = ["true", "pred", "outcome", "format", "sort", "find", "det", "boxes", "theme"];
  const DEFAULTS = { true: "", pred: "", outcome: "", format: "", sort: "order", find: "", det: "1", boxes: "1", theme: "" };
  let state = { ...DEFAULTS };

  function readHash() {
    state = { ...DEFAULTS };
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (NAMES.includes(name)) state[name] = value;
    }
  }

  function writeHash() {
    const changed = NAMES.filter((name) => state[name] !== DEFAULTS[name]).map((name) => [name, state[name]]);
    // A data: or sandboxed page may not rewrite its address; the view works without.
    try { history.replaceState(null, "", "#" + new URLSearchParams(changed)); } catch { /* keep going */ }
  }

  function matches(card) {
    const d = card.dataset;
    return (!state.true || d.true === state.true)
      && (!state.pred || d.pred === state.pred)
      && (!state.outcome || d.ok === (state.outcome === "right" ? "1" : "0"))
      && (!state.format || d.formed === (state.format === "valid" ? "1" : "0"))
      && (!state.find || card.textContent.toLowerCase().includes(state.find.toLowerCase()));
  }

  function apply() {
    for (const name of ["true", "pred", "outcome", "format", "sort", "find"]) {
      controls[name].value = state[name];
      if (controls[name].value !== state[name]) state[name] = controls[name].value = DEFAULTS[name]; // not an option
    }
    controls.det.checked = state.det === "1";
    controls.boxes.checked = state.boxes === "1";
    const key = { // faces without IoU go last either way
      order: (c) => 0,
      low: (c) => (c.dataset.iou === "" ? 2 : Number(c.dataset.iou)),
      high: (c) => (c.dataset.iou === "" ? 2 : -Number(c.dataset.iou)),
    }[state.sort];
    cards.sort((a, b) => key(a) - key(b) || a.dataset.order - b.dataset.order);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !matches(card);
      shown += !card.hidden;
      grid.append(card);
    }
    grid.classList.toggle("hide-det", state.det !== "1");
    grid.classList.toggle("hide-pred", state.boxes !== "1");
    document.getElementById("count").textContent = `${shown} of ${cards.length} faces`;
    document.getElementById("empty").hidden = shown > 0;
    for (const cell of document.querySelectorAll("[data-cell]")) {
      cell.setAttribute("aria-pressed", String(cell.dataset.cell === `${state.true}/${state.pred}`));
    }
    if (state.theme) document.documentElement.dataset.theme = state.theme;
    else delete document.documentElement.dataset.theme;
    document.getElementById("theme").textContent = `Theme: ${state.theme || "auto"}`;
  }

  function set(changes) {
    Object.assign(state, changes);
    writeHash();
    apply();
  }

  form.addEventListener("input", (event) => {
    const { name, type, checked, value } = event.target;
    if (NAMES.includes(name)) set({ [name]: type === "checkbox" ? (checked ? "1" : "0") : value });
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("reset").addEventListener("click", () => set({ ...DEFAULTS, theme: state.theme }));
  document.getElementById("theme").addEventListener("click", () => {
    set({ theme: { "": "light", light: "dark", dark: "" }[state.theme] ?? "" });
  });
  for (const cell of document.querySelectorAll("[data-cell]")) {
    cell.addEventListener("click", () => {
      const [label, answer] = cell.dataset.cell.split("/");
      const again = state.true === label && state.pred === answer;
      set(again ? { true: "", pred: "" } : { true: label, pred: answer });
    });
  }

  // Hovering or focusing a box, its text or its row lights up all three and the detector box it was compared with.
  function pick(event) {
    const item = event.target.closest?.("[data-box]");
    const card = event.target.closest?.(".card");
    for (const old of document.querySelectorAll(".picked")) {
      old.classList.remove("picked");
      for (const on of old.querySelectorAll(".on")) on.classList.remove("on");
    }
    if (!item || !card) return;
    card.classList.add("picked");
    for (const same of card.querySelectorAll("[data-box]")) {
      same.classList.toggle("on", same.dataset.box === item.dataset.box);
    }
    for (const det of card.querySelectorAll(".det")) {
      det.classList.toggle("on", item.dataset.au !== "" && det.dataset.au === item.dataset.au);
    }
  }
  grid.addEventListener("pointerover", pick);
  grid.addEventListener("pointerleave", pick);
  grid.addEventListener("focusin", pick);
  grid.addEventListener("focusout", pick);

  // j / k: next and previous face.
  document.addEventListener("keydown", (event) => {
    if (!["j", "k"].includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select")) return;
    const visible = cards.filter((card) => !card.hidden);
    const at = visible.indexOf(document.activeElement?.closest(".card"));
    const next = visible[event.key === "j" ? at + 1 : Math.max(at - 1, 0)];
    if (next) next.focus();
  });

  window.addEventListener("hashchange", () => { readHash(); apply(); });
  readHash();
  apply();
})();
