// The state of the page (step, group, completion, colour, token, theme), kept in the address, and all that changes it.
(() => {
  const { run, el } = Inspector;
  const byId = (id) => document.getElementById(id);
  const recorded = run.records.map((record) => record.step);
  const colours = Object.keys(Inspector.quantities);
  const [FIRST, LAST] = Inspector.range;
  const state = { step: recorded.at(-1) ?? FIRST, group: 0, completion: 0, colour: "advantage", token: "", theme: "" };
  let shown = { record: null, group: null }; // what stands in the page now
  let picked = null; // [completion, box] under the pointer or the focus

  // ---- address
  function readHash() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (["step", "group", "completion"].includes(name)) state[name] = Number.parseInt(value, 10) || 0;
      else if (["colour", "token", "theme"].includes(name)) state[name] = value;
    }
  }

  function writeHash() {
    const entries = Object.entries(state).filter(([name, value]) => value !== "" && !(name === "colour" && value === "advantage"));
    // A data: or sandboxed page may not rewrite its address; the view works without.
    try { history.replaceState(null, "", `#${new URLSearchParams(entries)}`); } catch { /* keep going */ }
  }

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  // The record nearest to a step; of two as near the earlier.
  const nearest = (step) => recorded.reduce((best, r) => (Math.abs(r - step) < Math.abs(best - step) ? r : best), recorded[0]);
  const stepData = () => (recorded.length ? Inspector.step(nearest(state.step)) : null);

  // ---- drawing
  function render() {
    state.step = clamp(state.step, FIRST, LAST);
    if (!colours.includes(state.colour)) state.colour = "advantage";
    if (!["", "light", "dark"].includes(state.theme)) state.theme = "";
    const data = stepData();
    if (data) {
      state.group = clamp(state.group, 0, data.groups.length - 1);
      state.completion = clamp(state.completion, 0, data.groups[state.group].completions.length - 1);
    }
    byId("step").value = state.step;
    byId("colour").value = state.colour;
    Inspector.moveCursor(state.step);
    if (state.theme) document.documentElement.dataset.theme = state.theme;
    else delete document.documentElement.dataset.theme;
    byId("theme").textContent = `Theme: ${state.theme || "auto"}`;
    byId("where").replaceChildren(...whereText(data));
    byId("previous").disabled = !recorded.some((r) => r < state.step);
    byId("next").disabled = !recorded.some((r) => r > state.step);
    if (!data) return;
    if (shown.record !== data.step || shown.group !== state.group) {
      shown = { record: data.step, group: state.group };
      hideTip();
      byId("main").replaceChildren(stepHead(data), Inspector.groupTabs(data, state.group), Inspector.groupView(data, state.group));
      paint();
    }
    pin(data);
    for (const tick of byId("ticks").children) tick.classList.toggle("on", Number(tick.dataset.step) === data.step);
  }

  function whereText(data) {
    const at = [el("b", {}, `step ${state.step}`), el("span", { class: "dim" }, ` of ${LAST}`)];
    if (data && data.step !== state.step) at.push(el("span", { class: "dim" }, ` · not recorded, below: step ${data.step}`));
    return at;
  }

  function stepHead(data) {
    const problems = [...data.complaints.map((text) => `gate: ${text}`), ...data.notes];
    return el("div", { class: "stephead" },
      el("h2", {}, `Step ${data.step}`),
      el("p", { class: "dim" }, `${data.groups.length} of ${data.numGroups} groups · gradient norm ${Inspector.num(data.gradNorm, 3)}`),
      problems.length ? el("ul", { class: "alarm" }, ...problems.map((text) => el("li", {}, text))) : null);
  }

  function paint() {
    const tokens = Inspector.tokens(stepData().groups[state.group]);
    for (const node of document.querySelectorAll(".tok")) {
      Inspector.paint(node, tokens[node.dataset.c][node.dataset.i], state.colour);
    }
  }

  function pin(data) {
    for (const button of document.querySelectorAll("[data-pin]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.pin) === state.completion));
    }
    for (const row of document.querySelectorAll(".sums tbody tr")) row.classList.toggle("on", Number(row.dataset.c) === state.completion);
    Inspector.spellOut(data, state.group, state.completion);
    drawFace(data);
  }

  // The face with the boxes of the pinned completion, or of the one whose box is pointed at, that box singled out.
  function drawFace(data) {
    const group = data.groups[state.group];
    const [c, b] = picked ?? [state.completion, null];
    const { boxes } = group.completions[c];
    const face = byId("face");
    face.querySelector("svg")?.remove();
    face.append(Inspector.overlay(group.face, boxes, b));
    face.parentElement.classList.toggle("picked", b !== null);
    byId("about").replaceChildren(...(b !== null ? Inspector.boxWords(boxes[b], b, c)
      : [el("span", { class: "dim" }, boxes.length ? `red: box${boxes.length > 1 ? "es" : ""} of completion ${c + 1}` : `completion ${c + 1} has no valid box`)]));
    for (const node of document.querySelectorAll("[data-box][data-c]")) {
      node.classList.toggle("on", b !== null && Number(node.dataset.c) === c && Number(node.dataset.box) === b);
    }
  }

  function set(changes) {
    if ("step" in changes || "group" in changes) { picked = null; state.token = ""; }
    Object.assign(state, changes);
    render();
    if ("colour" in changes) recolour();
    writeHash();
  }

  function recolour() {
    Inspector.legend(byId("legend"), state.colour);
    if (stepData()) paint();
  }

  // ---- a token's numbers, and its box, under pointer or focus
  const tokenOf = (node) => Inspector.tokens(stepData().groups[state.group])[node.dataset.c][node.dataset.i];

  function point(node) {
    const data = stepData();
    if (!data) return;
    const target = node?.closest?.(".tok, tr[data-box]");
    const box = target?.dataset.box === undefined ? null : [Number(target.dataset.c), Number(target.dataset.box)];
    if (String(box) !== String(picked)) {
      picked = box;
      drawFace(data);
    }
    if (target?.classList.contains("tok")) showTip(target, data);
    else hideTip();
  }

  function showTip(node, data) {
    const token = tokenOf(node);
    const group = data.groups[state.group];
    const tip = byId("tip");
    const box = node.dataset.box === undefined ? [] : [el("p", { class: "boxline" },
      ...Inspector.boxWords(group.completions[token.completion].boxes[node.dataset.box], Number(node.dataset.box), token.completion))];
    tip.replaceChildren(...Inspector.tokenNumbers(token, group.lengths[token.completion]), ...box);
    tip.hidden = false;
    document.querySelector(".tok.at")?.classList.remove("at");
    node.classList.add("at");
    placeTip(node);
  }

  // Below the token, or above where there is no room.
  function placeTip(node) {
    const tip = byId("tip");
    const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    const room = window.innerHeight - at.bottom > height + 12;
    tip.style.left = `${clamp(at.left - 20, 8, Math.max(8, window.innerWidth - width - 8))}px`;
    tip.style.top = `${room ? at.bottom + 8 : Math.max(8, at.top - height - 8)}px`;
  }

  function hideTip() {
    byId("tip").hidden = true;
    document.querySelector(".tok.at")?.classList.remove("at");
  }

  function focusToken(c, i) {
    const node = document.querySelector(`.tok[data-c="${c}"][data-i="${i}"]`);
    if (!node) return;
    node.closest(".trace").querySelector('.tok[tabindex="0"]').tabIndex = -1;
    node.tabIndex = 0;
    node.focus();
  }

  // ---- events
  const main = byId("main");
  main.addEventListener("pointerover", (event) => point(event.target));
  main.addEventListener("pointerleave", () => point(document.activeElement));
  main.addEventListener("focusin", (event) => {
    point(event.target);
    const { c, i } = event.target.dataset;
    state.token = event.target.classList.contains("tok") ? `${c}.${i}` : "";
    writeHash();
  });
  main.addEventListener("focusout", () => point(null));
  main.addEventListener("click", (event) => {
    const { pin: c, group } = event.target.closest("[data-pin], .tab")?.dataset ?? {};
    const token = event.target.closest(".tok");
    if (c !== undefined) set({ completion: Number(c) });
    else if (group !== undefined) { set({ group: Number(group) }); document.querySelector('.tab[aria-pressed="true"]').focus(); }
    else if (token) focusToken(token.dataset.c, token.dataset.i);
  });
  window.addEventListener("scroll", () => {
    const node = document.querySelector(".tok.at");
    if (node) placeTip(node);
  }, { passive: true });

  byId("step").addEventListener("input", (event) => set({ step: Number(event.target.value) }));
  byId("ticks").addEventListener("click", (event) => { if (event.target.dataset.step) set({ step: Number(event.target.dataset.step) }); });
  byId("colour").addEventListener("change", (event) => set({ colour: event.target.value }));
  const moveRecord = (way) => {
    const next = way < 0 ? recorded.filter((r) => r < state.step).at(-1) : recorded.find((r) => r > state.step);
    if (next !== undefined) set({ step: next });
  };
  byId("previous").addEventListener("click", () => moveRecord(-1));
  byId("next").addEventListener("click", () => moveRecord(1));
  const nextTheme = () => set({ theme: { "": "light", light: "dark", dark: "" }[state.theme] });
  byId("theme").addEventListener("click", nextTheme);

  // Arrows inside a completion: from token to token, up and down to the same token of the next completion.
  function moveToken(event, node) {
    const tokens = Inspector.tokens(stepData().groups[state.group]);
    let [c, i] = [Number(node.dataset.c), Number(node.dataset.i)];
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      c = clamp(c + (event.key === "ArrowUp" ? -1 : 1), 0, tokens.length - 1);
    } else i = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: Infinity }[event.key];
    if (i === undefined) return false;
    focusToken(c, clamp(i, 0, tokens[c].length - 1));
    return true;
  }

  function nextBox() {
    const { boxes } = stepData().groups[state.group].completions[state.completion];
    const known = boxes.map((box, b) => [box.tokens?.[0], b]).filter(([i]) => i !== undefined);
    if (!known.length) return;
    const after = known.findIndex(([, b]) => picked && picked[0] === state.completion && b > picked[1]);
    focusToken(state.completion, known[Math.max(after, 0)][0]);
  }

  // The token of this step that is farthest from 0 in the chosen quantity; NaN is farther than anything.
  function toExtreme() {
    const { value } = Inspector.quantities[state.colour];
    let best = null;
    stepData().groups.forEach((group, g) => Inspector.tokens(group).flat().forEach((token) => {
      const found = value(token);
      const size = Number.isNaN(found) ? Infinity : Math.abs(found);
      if (!best || size > best.size) best = { size, g, token };
    }));
    if (!best) return;
    set({ group: best.g });
    set({ completion: best.token.completion });
    focusToken(best.token.completion, best.token.index);
  }
  byId("extreme").addEventListener("click", () => { if (stepData()) toExtreme(); });

  const KEYS = {
    p: () => moveRecord(-1), n: () => moveRecord(1),
    k: () => set({ group: state.group - 1 }), j: () => set({ group: state.group + 1 }),
    c: () => set({ colour: colours[(colours.indexOf(state.colour) + 1) % colours.length] }),
    x: () => set({ colour: colours.at(colours.indexOf(state.colour) - 1) }),
    b: nextBox, m: toExtreme, t: nextTheme,
    Escape: () => { picked = null; hideTip(); if (stepData()) drawFace(stepData()); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("select")) return;
    const token = event.target.closest?.(".tok");
    if (token && moveToken(event, token)) event.preventDefault();
    else if (/^[1-9]$/.test(event.key) && stepData()) {
      const c = Number(event.key) - 1;
      if (c < stepData().groups[state.group].completions.length) { set({ completion: c }); focusToken(c, 0); }
    } else if (stepData() || event.key === "t") KEYS[event.key]?.();
  });

  // ---- start
  const slider = byId("step");
  [slider.min, slider.max] = [FIRST, LAST];
  const share = (step) => (LAST > FIRST ? (step - FIRST) / (LAST - FIRST) : 0.5);
  byId("ticks").replaceChildren(...run.records.map(({ step, gate }) => {
    const tick = el("i", { "data-step": step, class: gate ? "gate" : "", title: `step ${step}, recorded${gate ? ", a gate tripped" : ""}` });
    tick.style.setProperty("--x", share(step));
    return tick;
  }));
  byId("colour").append(...colours.map((name) => el("option", { value: name }, Inspector.quantities[name].name)));
  byId("timebar").hidden = !recorded.length && FIRST === LAST;
  if (!recorded.length) for (const part of document.querySelectorAll(".pick, .legend, #previous, #next")) part.hidden = true;
  Inspector.drawCharts((step) => set({ step }));
  function restore() { // the address says what to show
    readHash();
    render();
    recolour();
    const at = state.token.match(/^(\d{1,4})\.(\d{1,6})$/);
    if (at) focusToken(at[1], at[2]);
  }
  window.addEventListener("hashchange", restore);
  restore();
})();
