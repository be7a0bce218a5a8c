"use strict";
// A pair at a time: a, b or t choose and go on; arrows move; h hides boxes; s saves the result file.
// Answers are kept in this browser, for each rater code apart, and leave it only as the file.
(() => {
  const $ = (id) => document.getElementById(id);
  const { study, set, seal } = $("study").dataset;
  const pairs = [...document.querySelectorAll("template[data-token]")];
  const base = `tag-preference-${study}-${set}`;
  const MAX_SECONDS = 3600;  // of one pair: someone has left the desk
  let state = null;  // { rater, expert, at, answers: { token: { choice, seconds } } }
  let shownAt = 0;
  let kept = true;

  // ---- what is kept
  function read(key) {
    try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
  }
  function write(key, value) {
    try { localStorage.setItem(key, JSON.stringify(value)); } catch { kept = false; $("not-kept").hidden = false; }
  }
  const keyOf = (rater) => `${base}-rater-${rater.toLowerCase()}`;
  function load(rater) {
    const old = read(keyOf(rater));
    return old && typeof old === "object" && old.answers ? old : null;
  }
  function keep() { write(keyOf(state.rater), state); }

  // ---- answers
  const token = (i) => pairs[i].dataset.token;
  const entry = (i) => state.answers[token(i)] || { choice: null, seconds: 0 };
  const answered = () => pairs.filter((_, i) => entry(i).choice !== null).length;
  function clock() {  // time goes to the pair that is on the screen
    const now = Date.now();
    if (state && shownAt && state.at < pairs.length && !document.hidden) {
      const old = entry(state.at);
      const seconds = Math.min(old.seconds + (now - shownAt) / 1000, MAX_SECONDS);
      state.answers[token(state.at)] = { ...old, seconds };
    }
    shownAt = now;
  }

  function choose(choice) {
    if (!state || state.at >= pairs.length) return;
    clock();
    const old = entry(state.at);
    const again = old.choice === choice;  // the same again takes it back
    state.answers[token(state.at)] = { ...old, choice: again ? null : choice };
    if (again) { keep(); show(); } else go(1);
  }
  function go(step) {
    clock();
    state.at = Math.min(Math.max(state.at + step, 0), pairs.length);
    keep();
    show();
    (state.at < pairs.length ? $("heading") : $("end-heading")).focus({ preventScroll: true });
    scrollTo(0, 0);
  }

  // ---- what is shown
  function show() {
    const done = answered();
    $("start").hidden = state !== null;
    $("progress").hidden = $("save").hidden = state === null;
    $("pair").hidden = !state || state.at >= pairs.length;
    $("end").hidden = !state || state.at < pairs.length;
    $("meter").value = done;
    $("count").textContent = `${done} of ${pairs.length} judged`;
    const who = $("rater-shown");
    who.textContent = "";
    who.append(`${state.rater} · `, changeLink());
    if (state.at < pairs.length) showPair();
    else showEnd(done);
  }
  function changeLink() {
    const link = document.createElement("button");
    link.type = "button";
    link.className = "link";
    link.textContent = "not you?";
    link.addEventListener("click", () => { clock(); keep(); state = null; start(); $("rater").focus(); });
    return link;
  }
  function showPair() {
    $("heading").textContent = `Face ${state.at + 1} of ${pairs.length}`;
    const stage = $("stage");
    stage.replaceChildren(pairs[state.at].content.cloneNode(true));
    const [a, b] = stage.querySelectorAll("img");
    b.src = a.src;
    const { choice } = entry(state.at);
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
    }
    for (const side of stage.querySelectorAll("[data-side]")) {
      side.classList.toggle("chosen", side.dataset.side === choice);
    }
    $("back").disabled = state.at === 0;
  }
  function showEnd(done) {
    const open = pairs.length - done;
    $("end-heading").textContent = open ? `${open} of ${pairs.length} pairs are still open` : "All pairs judged: thank you";
    $("end-text").textContent = open
      ? "You can go back to them, or save what you have and say so when you send the file."
      : "Save the result file now and send it to whoever gave you this page.";
    $("first-open").hidden = !open;
    $("saved").textContent = "";
  }
  function start() {
    for (const id of ["pair", "end", "progress", "save"]) $(id).hidden = true;
    $("start").hidden = false;
    $("rater-shown").textContent = "";
    describeRater();
  }
  function describeRater() {  // a code that has been used here goes on where it was
    const old = load($("rater").value.trim());
    if (old) document.querySelector(`[name="expert"][value="${old.expert ? "yes" : "no"}"]`).checked = true;
    $("go").textContent = old ? "Continue" : "Start";
  }

  // ---- the result file
  function asText() {
    clock();
    const answers = pairs.map((_, i) => {
      const { choice, seconds } = entry(i);
      return { pair: token(i), choice, seconds: Math.round(seconds) };
    });
    const saved = new Date().toISOString();
    const { rater, expert } = state;
    const lines = [study, set, seal, rater, expert ? "expert" : "lay", saved];
    for (const { pair, choice, seconds } of answers) lines.push(`${pair} ${choice || "-"} ${seconds}`);
    const file = { format: "tag preference result 1", study, set: Number(set), seal, rater, expert, saved, answers };
    return JSON.stringify({ ...file, checksum: sha256(lines.join("\n")) }, null, 1) + "\n";
  }
  function save() {
    if (!state) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([asText()], { type: "application/json" }));
    link.download = `preference-${study}-set${set}-${state.rater}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    keep();
    $("saved").textContent = `Saved as ${link.download}, where your browser puts downloads.`;
  }

  // SHA-256 of ASCII text (FIPS 180-4). The browser's own is missing from pages opened as files in some browsers.
  function sha256(text) {
    const primes = [];
    for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
    const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32);
    const K = primes.map((p) => fraction(Math.cbrt(p)));
    const H = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
    const bytes = [...text].map((c) => c.charCodeAt(0));
    const bits = bytes.length * 8;
    bytes.push(0x80);
    while (bytes.length % 64 !== 56) bytes.push(0);
    for (let i = 7; i >= 0; i--) bytes.push(Math.floor(bits / 2 ** (8 * i)) % 256);
    const rotate = (x, n) => (x >>> n) | (x << (32 - n));
    for (let at = 0; at < bytes.length; at += 64) {
      const w = [];
      for (let i = 0; i < 64; i++) {
        if (i < 16) {
          const j = at + 4 * i;
          w.push((bytes[j] << 24) | (bytes[j + 1] << 16) | (bytes[j + 2] << 8) | bytes[j + 3]);
          continue;
        }
        const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
        const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
        w.push((w[i - 16] + s0 + w[i - 7] + s1) | 0);
      }
      let [a, b, c, d, e, f, g, h] = H;
      for (let i = 0; i < 64; i++) {
        const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        const t1 = (h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
        const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
        [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
      }
      [a, b, c, d, e, f, g, h].forEach((v, i) => { H[i] = (H[i] + v) | 0; });
    }
    return H.map((v) => (v >>> 0).toString(16).padStart(8, "0")).join("");
  }

  // ---- what the rater does
  $("begin").addEventListener("submit", (event) => {
    event.preventDefault();
    const rater = $("rater").value.trim();
    if (!/^[A-Za-z0-9._-]{1,40}$/.test(rater)) {
      $("rater-error").textContent = "A code has 1 to 40 letters, digits, dots, dashes or underscores.";
      $("rater").setAttribute("aria-invalid", "true");
      $("rater").focus();
      return;
    }
    $("rater-error").textContent = "";
    $("rater").removeAttribute("aria-invalid");
    const expert = document.querySelector('[name="expert"]:checked').value === "yes";
    state = { at: 0, answers: {}, rater, ...load(rater), expert };
    shownAt = Date.now();
    write(base, { rater });
    keep();
    show();
    $("heading").focus({ preventScroll: true });
    scrollTo(0, 0);
  });
  $("rater").addEventListener("input", describeRater);
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  $("back").addEventListener("click", () => go(-1));
  $("next").addEventListener("click", () => go(1));
  $("review").addEventListener("click", () => go(-1));
  $("first-open").addEventListener("click", () => {
    go(pairs.findIndex((_, i) => entry(i).choice === null) - state.at);
  });
  $("save").addEventListener("click", save);
  $("save-end").addEventListener("click", save);
  function boxes() {
    const hidden = document.body.classList.toggle("hide-boxes");
    $("boxes").textContent = hidden ? "Show boxes" : "Hide boxes";
    $("boxes").setAttribute("aria-pressed", String(hidden));
  }
  $("boxes").addEventListener("click", boxes);
  $("theme").addEventListener("click", () => {
    const theme = { "": "light", light: "dark", dark: "" }[document.documentElement.dataset.theme || ""];
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    $("theme").textContent = `Theme: ${theme || "auto"}`;
  });
  document.addEventListener("keydown", (event) => {
    if (!state || event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input")) return;
    const keys = {
      a: () => choose("A"), b: () => choose("B"), t: () => choose("tie"), h: boxes, s: save,
      ArrowRight: () => state.at < pairs.length && go(1), ArrowLeft: () => go(-1),
    };
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (Object.hasOwn(keys, key)) { event.preventDefault(); keys[key](); }
  });
  document.addEventListener("visibilitychange", () => { if (state) { if (document.hidden) keep(); shownAt = Date.now(); } });

  // Pointing at a box lights up its number in the text, and the other way round.
  function light(event) {
    const item = event.target.closest?.("[data-box]");
    for (const old of $("stage").querySelectorAll(".picked, .on")) old.classList.remove("picked", "on");
    const response = item?.closest(".response");
    if (!response) return;
    response.classList.add("picked");
    for (const same of response.querySelectorAll("[data-box]")) {
      same.classList.toggle("on", same.dataset.box === item.dataset.box);
    }
  }
  for (const kind of ["pointerover", "pointerleave", "focusin", "focusout"]) $("stage").addEventListener(kind, light);

  window.preference = { asText, sha256 };  // for whoever drives the page by script
  const last = read(base);
  write(base, last || {});
  const old = last?.rater && load(last.rater);
  $("rater").value = last?.rater || "";
  if (old) { state = old; shownAt = Date.now(); show(); } else start();
})();
