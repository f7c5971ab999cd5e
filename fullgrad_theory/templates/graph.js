// Modules are nested boxes, closed at first; only what is open is laid out: layers by the longest
// path among a box's own items, each as far left as what it reads lies. All text is set as text.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = (i) => data.texts[i];
  const drawing = document.getElementById("drawing"), details = document.getElementById("details");
  const root = { path: "", name: data.model, items: [], boxes: new Map(), open: true, up: null, edges: [] };
  const nodes = data.nodes.map((row, order) => {
    const [name, op, module, kind, degree, error, before, edit, reason, source] =
      row.slice(0, 10).map((value, place) => (place === 3 ? value : text(value)));
    return { name, op, module, kind, degree, error, before, edit, reason, source, order,
      reads: row[10], readers: [] };
  });
  const byName = new Map(nodes.map((node) => [node.name, node]));
  for (const node of nodes) {
    let box = root;
    for (const part of node.module ? node.module.split(".") : []) {
      if (!box.boxes.has(part)) {
        const path = box.path ? `${box.path}.${part}` : part;
        const made = { path, name: part, items: [], boxes: new Map(), open: false, up: box, edges: [],
          order: node.order };
        box.boxes.set(part, made);
        box.items.push(made);
      }
      box = box.boxes.get(part);
    }
    node.up = box;
    box.items.push(node);
  }
  const isBox = (item) => item.items !== undefined;
  function tidy(box) { // a box that holds one box alone is drawn as that one; kinds are counted
    for (let place = 0; place < box.items.length; place++) {
      let item = box.items[place];
      if (!isBox(item)) continue;
      while (item.items.length === 1 && isBox(item.items[0])) {
        const inner = item.items[0];
        inner.name = `${item.name}.${inner.name}`;
        item = inner;
      }
      item.up = box;
      box.items[place] = item;
      tidy(item);
    }
    box.counts = data.kinds.map(() => 0);
    for (const item of box.items) {
      if (isBox(item)) item.counts.forEach((count, kind) => { box.counts[kind] += count; });
      else box.counts[item.kind] += 1;
    }
  }
  tidy(root);
  const road = (item) => { const found = []; for (let at = item; at; at = at.up) found.unshift(at); return found; };
  for (const node of nodes) { // each edge belongs to the innermost box that holds both its ends
    for (const place of node.reads) {
      const from = nodes[place], there = road(from), here = road(node);
      from.readers.push(node);
      let shared = 0;
      while (there[shared] === here[shared]) shared++;
      there[shared - 1].edges.push([there[shared], here[shared]]);
    }
  }

  const HEAD = 26, GAP = 16, BETWEEN = 30, LETTER = 7.3;
  const label = (item) => (item.label ??= isBox(item)
    || ["placeholder", "output"].includes(item.op) ? item.name : item.op.replace(/^aten\./, "").replace(/\.default$/, ""));
  function lay(item) {
    if (!isBox(item)) { item.w = 40 + LETTER * Math.min(30, label(item).length); item.h = 28; return; }
    if (!item.open) {
      const signs = item.counts.filter((count) => count).length;
      item.w = Math.max(52 + LETTER * Math.min(40, item.name.length), 20 + 62 * signs); item.h = 48;
      return;
    }
    item.items.forEach(lay);
    const layer = new Map(item.items.map((one, place) => [one, data.linked ? 0 : place]));
    const into = new Map();
    for (const [from, to] of item.edges) {
      if (!into.has(to)) into.set(to, new Set());
      if (from.order < to.order) into.get(to).add(from); // a module that is called twice goes round
    }
    for (const one of [...item.items].sort((a, b) => a.order - b.order))
      for (const from of into.get(one) ?? []) layer.set(one, Math.max(layer.get(one), layer.get(from) + 1));
    const rows = [];
    for (const one of item.items) (rows[layer.get(one)] ??= []).push(one);
    const total = (row) => row.reduce((sum, one) => sum + one.w + GAP, -GAP);
    const filled = rows.filter(Boolean), inner = Math.max(...filled.map(total), 60 + LETTER * item.name.length);
    let y = HEAD + 10;
    for (const row of filled) {
      const middle = (one) => {
        const read = [...(into.get(one) ?? [])];
        return read.length ? read.reduce((sum, from) => sum + from.x + from.w / 2, 0) / read.length : inner / 2;
      };
      row.sort((a, b) => middle(a) - middle(b) || a.order - b.order);
      let x = GAP + (inner - total(row)) / 2;
      for (const one of row) { one.x = x; one.y = y; x += one.w + GAP; }
      y += Math.max(...row.map((one) => one.h)) + BETWEEN;
    }
    item.w = inner + 2 * GAP + 34; // room on the right for what skips layers
    item.h = y - BETWEEN + 12;
  }

  const make = (kind, attributes, inside) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (inside !== undefined) made.textContent = inside;
    return made;
  };
  let chosen = null, zoom = 1;
  const short = (words, most) => (words.length > most ? `${words.slice(0, most - 1)}…` : words);
  function button(item, said, act) {
    const made = make("g", { role: "button", tabindex: 0, "aria-label": said });
    made.append(make("title", {}, said));
    const go = (event) => { event.stopPropagation(); act(); };
    made.addEventListener("click", go);
    made.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); go(event); }
    });
    item.drawn = made;
    return made;
  }
  function put(item, x, y, page, ground) { // open boxes are the ground that edges run on
    item.X = x; item.Y = y;
    if (!isBox(item)) {
      const kind = data.kinds[item.kind];
      const made = button(item, `${item.name}, ${item.op}: ${kind.word}`, () => choose(item));
      made.dataset.name = item.name;
      made.append(
        make("rect", { x, y, width: item.w, height: item.h, rx: 5, fill: kind.tint, stroke: kind.colour, "stroke-width": 2 }),
        make("text", { x: x + 8, y: y + 19, "font-weight": 700 }, kind.sign),
        make("text", { x: x + 26, y: y + 19 }, short(label(item), 30)));
      if (item === chosen) made.classList.add("chosen");
      page.append(made);
      return;
    }
    const kinds = item.counts.map((count, kind) => [count, data.kinds[kind]]).filter(([count]) => count);
    const worst = kinds.map(([, kind]) => kind).sort((a, b) => b.rank - a.rank)[0];
    const said = `${item.path || item.name}: ${kinds.map(([count, kind]) => `${count} ${kind.word}`).join(", ")}`;
    const made = button(item, said, () => { item.open = !item.open; render(); item.drawn.focus({ preventScroll: true }); });
    made.dataset.module = item.path;
    made.setAttribute("aria-expanded", item.open);
    made.append(
      make("rect", { x, y, width: item.w, height: item.h, rx: 8, fill: "#fff", stroke: worst.colour, "stroke-width": item.open ? 1.2 : 2.5 }),
      make("text", { x: x + 9, y: y + 18, "font-weight": 700 }, `${item.open ? "▾" : "▸"} ${short(item.name, 40)}`));
    (item.open ? ground : page).append(made);
    if (item.open) { item.items.forEach((one) => put(one, x + one.x, y + one.y, page, ground)); return; }
    kinds.forEach(([count, kind], place) => {
      made.append(
        make("rect", { x: x + 8 + 62 * place, y: y + 25, width: 56, height: 18, rx: 4, fill: kind.tint, stroke: kind.colour }),
        make("text", { x: x + 13 + 62 * place, y: y + 38 }, `${kind.sign} ${count}`));
    });
  }
  function seen(node) { // the outermost closed box around it, or the node itself
    let found = node;
    for (let at = node.up; at; at = at.up) if (!at.open) found = at;
    return found;
  }
  function join(page) {
    const drawn = new Set();
    for (const node of nodes) for (const place of node.reads) {
      const from = seen(nodes[place]), to = seen(node), key = `${from.order}${isBox(from)}-${to.order}${isBox(to)}`;
      if (from === to || drawn.has(key)) continue;
      drawn.add(key);
      const x = from.X + from.w / 2, y = from.Y + from.h, X = to.X + to.w / 2, Y = to.Y, down = Y - y;
      const far = down > BETWEEN + 24 && Math.abs(X - x) < (from.w + to.w) / 2;
      const side = Math.max(from.X + from.w, to.X + to.w);
      const out = side + Math.min(30, 8 + down * 0.04), a = from.Y + from.h / 2, b = to.Y + to.h / 2;
      const path = make("path", { d: far || down < 0
        ? `M${from.X + from.w} ${a}C${out} ${a} ${out} ${a} ${out} ${a + 20 * Math.sign(b - a)}L${out} ${b - 20 * Math.sign(b - a)}C${out} ${b} ${out} ${b} ${to.X + to.w} ${b}`
        : `M${x} ${y}C${x} ${y + down / 2} ${X} ${Y - down / 2} ${X} ${Y}` });
      if (chosen && (from === seen(chosen) || to === seen(chosen))) path.classList.add("chosen");
      page.append(path);
    }
  }
  function render() {
    lay(root);
    const svg = make("svg", { width: (root.w + 8) * zoom, height: (root.h + 8) * zoom, viewBox: `-4 -4 ${root.w + 8} ${root.h + 8}` });
    const ground = make("g", {}), edges = make("g", {}), page = make("g", {});
    svg.append(ground, edges, page);
    put(root, 0, 0, page, ground);
    join(edges);
    drawing.replaceChildren(svg);
  }
  function row(list, title, ...inside) {
    const term = document.createElement("dt"), said = document.createElement("dd");
    term.textContent = title;
    said.append(...inside);
    list.append(term, said);
  }
  function link(node) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = node.name;
    made.addEventListener("click", () => show(node));
    return made;
  }
  function choose(node) {
    chosen = node;
    render();
    node.drawn.focus({ preventScroll: true });
    const title = document.createElement("h3"), list = document.createElement("dl"), kind = data.kinds[node.kind];
    title.textContent = node.name;
    row(list, "verdict", `${kind.sign} ${kind.word}: ${kind.means}`);
    row(list, "operation", node.op);
    const facts = { degrees: node.degree, "lemma or reason": node.reason, "local error": node.error,
      "local error before the edits": node.before, edit: node.edit, module: node.module, "source line": node.source };
    for (const [name, value] of Object.entries(facts)) if (value) row(list, name, value);
    if (node.reads.length) row(list, "reads", ...node.reads.map((place) => link(nodes[place])));
    if (node.readers.length) row(list, "read by", ...node.readers.slice(0, 20).map(link));
    details.replaceChildren(title, list);
    if (matchMedia("(max-width: 900px)").matches) details.scrollIntoView({ block: "nearest" });
  }
  function show(node) {
    for (let at = node.up; at; at = at.up) at.open = true;
    choose(node);
    drawing.scrollTo((node.X + node.w / 2) * zoom - drawing.clientWidth / 2, (node.Y + node.h / 2) * zoom - drawing.clientHeight / 2);
  }
  const every = (box, act) => { for (const one of box.items) if (isBox(one)) { act(one); every(one, act); } };
  const bad = (kind) => data.kinds[kind].rank > 2;
  const on = (id, act) => document.getElementById(id)?.addEventListener("click", act);
  on("all", () => { every(root, (box) => { box.open = true; }); render(); });
  on("none", () => { every(root, (box) => { box.open = false; }); render(); });
  on("obstacles", () => { every(root, (box) => { box.open = box.counts.some((count, kind) => count && bad(kind)); }); render(); });
  on("larger", () => { zoom = Math.min(3, zoom * 1.25); render(); });
  on("smaller", () => { zoom = Math.max(0.1, zoom / 1.25); render(); });
  for (const one of document.querySelectorAll("button[data-node]")) one.addEventListener("click", () => {
    show(byName.get(one.dataset.node));
    document.getElementById("graph").scrollIntoView();
  });
  for (let row = [root], shown = root.items.length; row.length && shown <= 30;) { // as much as is read at once
    for (const box of row) box.open = true;
    row = row.flatMap((box) => box.items.filter(isBox));
    shown = row.reduce((sum, box) => sum + box.items.length, 0);
  }
  let last = -1;
  document.getElementById("find").addEventListener("keydown", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    if (event.key !== "Enter" || !wanted) return;
    const fits = (node) => `${node.name} ${node.op} ${node.module}`.toLowerCase().includes(wanted);
    const found = nodes.find((node) => node.order > last && fits(node)) ?? nodes.find(fits);
    event.target.setAttribute("aria-invalid", !found);
    if (found) { last = found.order; show(found); event.target.focus({ preventScroll: true }); }
  });
  render();
})();
