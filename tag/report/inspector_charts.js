// The run over its steps: small line charts, stacked shares, and one strip a class, with one cursor through all of them.
(() => {
  const { run, el, svg, num, percent } = Inspector;
  const { steps } = run.metrics;
  const WIDTH = 300, HEIGHT = 112, LEFT = 36, RIGHT = 6, TOP = 6, BOTTOM = 16;
  const recorded = run.records.map((record) => record.step);
  const first = Math.min(steps[0] ?? Infinity, recorded[0] ?? Infinity);
  const last = Math.max(steps.at(-1) ?? 0, recorded.at(-1) ?? 0);
  Inspector.range = [Number.isFinite(first) ? first : 0, last];

  // lines: [metric, name]; "dots": true for points now and then; a chart without any of its metrics is left out.
  const CHARTS = [
    { title: "Reward", lines: [["reward", "R"], ["reward_au", "R_AU"], ["reward_ans", "R_ans"], ["reward_fmt", "R_fmt"]], zero: true },
    { title: "Accuracy", lines: [["reward_ans", "sampled (R_ans)"], ["val_accuracy", "held-out, greedy", true]], share: true },
    { title: "AU IoU", lines: [["iou", "Eq. 4"], ["iou_matched", "one-to-one"], ["val_au_iou", "held-out", true]], share: true },
    { title: "Groups", stack: [["groups_all_right", "all right"], ["groups_mixed", "mixed"], ["groups_all_wrong", "all wrong"]],
      lines: [["groups_flat", "flat"], ["groups_no_au", "no AU boxes"]], share: true },
    { title: "KL to the reference", lines: [["kl", "KL"], ["approx_kl", "to π_old"]], zero: true },
    { title: "Ratio", band: ["ratio_min", "ratio_max"], lines: [["ratio_mean", "mean"], ["ratio_min", "min"], ["ratio_max", "max"]] },
    { title: "Clip fraction", lines: [["clipfrac", "of tokens"]], zero: true },
    { title: "Entropy", lines: [["entropy", "nats a token"]], zero: true },
    { title: "Completion length", lines: [["completion_tokens", "tokens"]], zero: true },
    { title: "Gradient norm", lines: [["grad_norm", "before clipping"]], zero: true },
    { title: "Loss", lines: [["loss", "loss"], ["policy_loss", "policy"], ["kl_loss", "β KL"]] },
    { title: "Share of advantage variance", lines: [["variance_au", "R_AU"], ["variance_ans", "R_ans"], ["variance_fmt", "R_fmt"]], zero: true },
    { title: "Boxes a completion", stack: [["k0", "0"], ["k1", "1"], ["k2", "2"], ["k3", "3"], ["k_over_3", "> 3"]], share: true },
    { title: "Box audit", lines: [["box_au_agreement", "box fits named AU"], ["duplicate_box_rate", "copies"], ["whole_face_box_rate", "whole face"]], share: true },
    { title: "Sampled − scored log-prob", lines: [["logprob_mismatch_max", "max"], ["logprob_mismatch_mean", "mean"]], zero: true },
    { title: "Cut off, well-formed", lines: [["truncated", "cut off"], ["val_format_valid", "held-out format", true]], share: true },
  ];
  const STRIPS = [
    { title: "Accuracy by class", key: "accuracy", text: percent },
    { title: "AU IoU by class", key: "iou", text: (v) => num(v, 2) },
    ...["all right", "mixed", "all wrong", "flat", "no AU boxes"].map((kind) => (
      { title: `Groups by class: ${kind}`, key: kind, text: percent })),
  ];

  const SIDE = 52; // room for class names

  const x = (step, left = LEFT) => left + (WIDTH - left - RIGHT) * (last > first ? (step - first) / (last - first) : 0.5);
  const updates = []; // called with the step under the cursor

  function frame(title, names) {
    const key = el("span", { class: "names" }, ...names.map(([name, kind]) =>
      el("span", { class: kind }, el("i", { "aria-hidden": "true" }), name, " ", el("b", { class: "num" }))));
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title} over steps` });
    const figure = el("figure", { class: "chart" }, el("figcaption", {}, el("strong", {}, title), key), picture);
    return { figure, picture, values: [...key.querySelectorAll("b")] };
  }

  function axes(picture, low, high, text) {
    const y = (v) => TOP + (HEIGHT - TOP - BOTTOM) * (high > low ? (high - v) / (high - low) : 0.5);
    for (const v of high > low ? [low, (low + high) / 2, high] : [low]) {
      picture.append(
        svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v) }),
        svg("text", { x: LEFT - 4, y: y(v) + 3, "text-anchor": "end" }, text(v)),
      );
    }
    bottom(picture, LEFT);
    return y;
  }

  function bottom(picture, left) {
    picture.append(
      svg("text", { x: left, y: HEIGHT - 3 }, String(Inspector.range[0])),
      svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, `step ${last}`),
    );
  }

  function cursor(picture, left = LEFT) {
    picture.dataset.left = left;
    const line = svg("line", { class: "cursor", y1: TOP - 3, y2: HEIGHT - BOTTOM });
    picture.append(line);
    updates.push((step) => { line.setAttribute("x1", x(step, left)); line.setAttribute("x2", x(step, left)); });
  }

  const column = (metric) => run.metrics[metric];

  // The value at a step, or of the step before it that has one.
  function valueAt(metric, step) {
    let found = null;
    for (let i = 0; i < steps.length && steps[i] <= step; i++) found = column(metric)[i] ?? found;
    return found;
  }

  function lineChart({ title, lines = [], stack = [], band, share, zero }) {
    lines = lines.filter(([metric]) => column(metric));
    stack = stack.filter(([metric]) => column(metric));
    if (!lines.length && !stack.length) return null;
    const names = [...stack.map(([, name], i) => [name, `area s${i}`]), ...lines.map(([, name, dots], i) => [name, dots ? `dot c${i}` : `line c${i}`])];
    const { figure, picture, values } = frame(title, names);
    let [low, high] = [0, 1];
    if (!share) {
      const all = lines.flatMap(([metric]) => column(metric)).filter((v) => v !== null);
      [low, high] = [Math.min(...all), Math.max(...all)];
      if (zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
      if (high - low < 1e-12) high = low + (Math.abs(low) || 1);
    }
    const y = axes(picture, low, high, (v) => (share ? percent(v) : num(v, 2)));
    const points = (metric) => steps.map((step, i) => [step, column(metric)[i]]).filter(([, v]) => v !== null);
    const path = (list, at) => list.map(([step, v], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${at(v).toFixed(1)}`).join("");
    let below = steps.map(() => 0);
    stack.forEach(([metric], i) => {
      const above = below.map((v, j) => v + (column(metric)[j] ?? 0));
      const has = steps.map((step, j) => [step, j]).filter(([, j]) => column(metric)[j] !== null);
      if (has.length) {
        const edge = path(has, (j) => y(above[j])) + path(has.slice().reverse(), (j) => y(below[j])).replace("M", "L");
        picture.append(svg("path", { class: `area s${i}`, d: `${edge}Z` }));
      }
      below = above;
    });
    if (band && column(band[0]) && column(band[1])) {
      const edge = path(points(band[0]), y) + path(points(band[1]).reverse(), y).replace("M", "L");
      picture.append(svg("path", { class: "band", d: `${edge}Z` }));
    }
    lines.forEach(([metric, , dots], i) => {
      const list = points(metric);
      if (!dots) picture.append(svg("path", { class: `line c${i}`, d: path(list, y) }));
      if (dots || list.length <= 12) {
        for (const [step, v] of list) picture.append(svg("circle", { class: `dot c${i}`, cx: x(step), cy: y(v), r: dots ? 3 : 2 }));
      }
    });
    cursor(picture);
    const metrics = [...stack, ...lines].map(([metric]) => metric);
    updates.push((step) => metrics.forEach((metric, i) => { values[i].textContent = num(valueAt(metric, step), 3); }));
    return figure;
  }

  // One row a class, one cell a recorded step; the darker the larger.
  function strip({ title, key, text }, classes) {
    const has = run.records.some((record) => Object.values(record.classes).some((c) => c[key] !== null));
    if (!has) return null;
    const { figure, picture } = frame(title, []);
    const height = (HEIGHT - TOP - BOTTOM) / classes.length;
    const gaps = recorded.slice(1).map((step, i) => x(step, SIDE) - x(recorded[i], SIDE));
    const width = Math.max(2, Math.min(26, ...gaps));
    classes.forEach((label, row) => {
      const y = TOP + row * height;
      picture.append(svg("text", { x: 0, y: y + height / 2 + 3 }, label));
      for (const record of run.records) {
        const found = record.classes[label];
        if (!found || found[key] === null) continue;
        const cell = svg("rect", { class: "cell", x: Math.max(SIDE - 2, x(record.step, SIDE) - width / 2), y: y + 0.5, width, height: height - 1 },
          svg("title", {}, `${label}, step ${record.step}: ${text(found[key])} (${found.groups} groups)`));
        cell.style.setProperty("--v", found[key]);
        picture.append(cell);
      }
    });
    bottom(picture, SIDE);
    cursor(picture, SIDE);
    return figure;
  }

  Inspector.drawCharts = (pickStep) => {
    const home = document.getElementById("charts");
    const classes = [...new Set(run.records.flatMap((record) => Object.keys(record.classes)))].sort();
    const figures = [...CHARTS.map(lineChart), ...STRIPS.map((spec) => strip(spec, classes))].filter(Boolean);
    home.replaceChildren(...figures);
    document.getElementById("timeline").hidden = !figures.length;
    home.addEventListener("click", (event) => {
      const picture = event.target.closest("svg");
      if (!picture) return;
      const box = picture.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * WIDTH;
      const left = Number(picture.dataset.left);
      const share = Math.max(0, Math.min(1, (at - left) / (WIDTH - left - RIGHT)));
      pickStep(Math.round(first + share * (last - first)));
    });
  };
  Inspector.moveCursor = (step) => updates.forEach((update) => update(step));
})();
