// The face: detector boxes dashed and green, the boxes of one completion solid and red, as in tag/report/face_html.py.
(() => {
  const { el, svg, fixed } = Inspector;
  const SIZE = 512, LABEL = 28;

  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

  // Upper left corner of a label on the line y = top, moved off the labels placed before it where there is room.
  function place(x, top, width, taken) {
    x = Math.min(Math.max(x, 1), SIZE - width - 1);
    const start = Math.min(Math.max(top - LABEL, 1), SIZE - LABEL - 1);
    let found = [x, start, x + width, start + LABEL];
    for (const step of [0, 1, -1, 2, -2, 3]) {
      const y = start + step * (LABEL + 1);
      const spot = [x, y, x + width, y + LABEL];
      if (y >= 0 && y <= SIZE - LABEL && !taken.some((other) => overlap(spot, other))) { found = spot; break; }
    }
    taken.push(found);
    return found;
  }

  function outline([x1, y1, x2, y2]) {
    const at = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    return [svg("rect", { class: "casing", ...at }), svg("rect", { class: "line", ...at })];
  }

  // boxes: of the completion that is shown; picked: index of the one to single out, or null.
  Inspector.overlay = (face, boxes, picked) => {
    const taken = [], lines = [], labels = [];
    const au = picked === null || !boxes[picked] ? null : boxes[picked].au;
    boxes.forEach((box, i) => {
      const kind = `pred${box.counted ? "" : " uncounted"}${i === picked ? " on" : ""}`;
      const width = 14 * String(i + 1).length + 12;
      const [x, y] = place(box.box[2] - width + 1, box.box[1], width, taken);
      lines.push(svg("g", { class: kind, "data-box": i }, ...outline(box.box)));
      labels.push(svg("g", { class: kind, "data-box": i },
        svg("rect", { class: "chip", x, y, width, height: LABEL, rx: 4 }),
        svg("text", { x: x + width / 2, y: y + 22, "text-anchor": "middle" }, String(i + 1))));
    });
    const under = [];
    for (const [name, score, box] of face.aus) {
      const kind = `det${name === au ? " on" : ""}`;
      const text = `${name} ${fixed(score, 2)}`;
      const [x, y] = place(box[0] + 2, box[1], 14.2 * text.length + 8, taken);
      under.push(svg("g", { class: kind, "data-au": name }, ...outline(box)));
      labels.unshift(svg("g", { class: kind, "data-au": name }, svg("text", { x: x + 3, y: y + 21 }, text)));
    }
    return svg("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, role: "img",
      "aria-label": `${face.aus.length} detector boxes, ${boxes.length} predicted boxes` }, ...under, ...lines, ...labels);
  };

  Inspector.picture = (face, size) => (face.image?.startsWith("data:image/")
    ? el("img", { src: face.image, alt: `face ${face.id}`, width: size, height: size, decoding: "async" })
    : el("div", { class: "missing" }, `no image: ${face.why}`));

  // What box `index` of completion `c` was compared with, in words.
  Inspector.boxWords = (box, index, c) => {
    const words = [el("b", {}, `Completion ${c + 1}, box ${index + 1}`), ` [${box.box.join(", ")}]`];
    const line = (...parts) => words.push(el("br"), ...parts);
    line(box.named ? `the text names ${box.named}` : "the text names no AU for it");
    if (box.au) line("closest detector box: ", el("b", {}, box.au), ", IoU ", el("b", { class: "num" }, fixed(box.iou)));
    else line("overlaps no detector box: IoU 0");
    line(box.counted ? "counted: among the best min(n, k) of the first three" : "not counted: not among the best min(n, k) of the first three");
    line(box.matched ? `one-to-one: ${box.matched}, IoU ${fixed(box.matchedIou)}` : "one-to-one: left without partner");
    return words;
  };
})();
