"use strict";
(async () => {
  // -- elements: texts of records become text nodes, never markup ------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.filter((c) => c != null));
    return node;
  };
  const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
  const option = (value, text, chosen) => el("option", { value, selected: chosen }, text);
  const labelled = (text, control) => el("label", {}, text, control);
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  // -- data ------------------------------------------------------------------------------------
  if (!("DecompressionStream" in window)) return;
  async function inflated(line) {
    const bytes = Uint8Array.from(atob(line), (c) => c.charCodeAt(0));
    return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
  }
  // The first line says what the columns are and which of them each block has; a block is a line.
  const [data, ...blocks] = await Promise.all(byId("data").textContent.split("\n").map(inflated));
  data.rows = data.blocks.reduce((sum, [rows]) => sum + rows, 0);
  const pieces = data.columns.map(() => []);
  let begin = 0;
  data.blocks.forEach(([rows, places], i) => {
    places.forEach((place, k) => pieces[place].push({ begin, rows, ...(blocks[i][blocks[i][k].like ?? k]) }));
    begin += rows;
  });
  const NOT_FINITE = ["inf", "-inf", "nan"];
  function joined(parts) {
    const [first] = parts, whole = parts.reduce((sum, p) => sum + p.rows, 0) === data.rows;
    const ends = parts.some((p) => p.low) ? { low: new Array(data.rows).fill(null), high: new Array(data.rows).fill(null) } : {};
    for (const p of parts) for (let i = 0; p.low && i < p.rows; i++) { ends.low[p.begin + i] = p.low[i]; ends.high[p.begin + i] = p.high[i]; }
    if (whole && parts.every((p) => "value" in p && p.value === first.value)) return { value: first.value, ...ends };
    const ofNumbers = (p) => "numbers" in p || typeof p.value === "number";
    const numeric = parts.some(ofNumbers) && parts.every((p) => ofNumbers(p) || ("value" in p && (p.value == null || NOT_FINITE.includes(p.value))));
    const levels = [null], codes = new Map([[null, 0]]), found = new Array(data.rows).fill(numeric ? null : 0);
    const code = (v) => { const t = v == null ? null : String(v); if (!codes.has(t)) codes.set(t, levels.push(t) - 1); return codes.get(t); };
    for (const p of parts) {
      const known = numeric ? null : p.levels?.map(code) ?? ("value" in p ? code(p.value) : null);
      for (let i = 0; i < p.rows; i++) found[p.begin + i] = numeric ? ("value" in p ? p.value : p.numbers[i]) : p.codes ? known[p.codes[i]] : known ?? code(p.numbers[i]);
    }
    return numeric ? { numbers: found, ...ends } : { levels, codes: found, ...ends };
  }
  const columns = data.columns.map((head, place) => {
    const c = joined(pieces[place]), numeric = "numbers" in c || typeof c.value === "number";
    const at = "value" in c ? () => c.value : numeric ? (i) => c.numbers[i] : (i) => c.levels[c.codes[i]];
    return { group: "", unit: "", better: "", ...head, ...c, numeric, at };
  });
  const all = Array.from({ length: data.rows }, (_, i) => i);
  const run = Object.fromEntries(columns.filter((c) => c.group === "run").map((c) => [c.name, c]));
  const others = run.artefact?.at;  // of runs that are not the artefact themselves
  run.artefact = Object.assign(run.artefact ?? {}, { at: (row) => others?.(row) ?? run.key?.at(row) });
  const text = (name, row) => { const v = run[name]?.at(row); return v == null ? "" : String(v); };
  const called = (row) => [text("method", row), text("point", row), `seed ${text("seed", row)}`, text("key", row).slice(0, 8)]
    .filter(Boolean).join(" ");
  function number(v) { return v === "inf" ? Infinity : v === "-inf" ? -Infinity : typeof v === "number" ? v : NaN; }

  // -- numbers as people read them; as effbench.report.table.readable ------------------------------
  function scale(size, unit) {
    const steps = unit.startsWith("bytes") ? [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]]
      : [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1, ""]];
    return steps.find(([factor]) => Math.abs(size) >= factor) ?? steps.at(-1);
  }
  // Made once each: a filter formats some ten thousand numbers between a key and the paint.
  const plain = Array.from({ length: 7 }, (_, digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  const digits = (v) => v ? Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(Math.abs(v))))) : 0;
  function readable(v, unit = "") {
    if (typeof v !== "number") return v == null ? "" : String(v);
    const [factor, prefix] = scale(v, unit);
    const s = v / factor;
    const shown = s && Math.abs(s) < 1e-3 ? s.toPrecision(3) : Number.isInteger(s) && Math.abs(s) < 1e6
      ? plain[0].format(s) : plain[digits(s)].format(s);
    return `${shown} ${prefix}`.trim();
  }
  const isMetric = (c) => c.group === "usual" || c.group === "metrics";
  function cell(c, row) {
    const v = c.at(row);
    if (!c.numeric) return v ?? "";
    const shown = c.group !== "settings" && !Number.isInteger(v) || isMetric(c) || c.group === "plan" ? readable(v, c.name.endsWith(" bytes") ? "bytes" : c.unit) : v == null ? "" : String(v);
    const low = c.low?.[row], high = c.high?.[row];
    return low == null || high == null ? shown : `${shown} [${readable(low, c.unit)}, ${readable(high, c.unit)}]`;
  }

  // -- which rows and columns are shown --------------------------------------------------------
  const state = { text: "", choices: {}, groups: new Set(["run", "usual"]), differing: true, sort: null, down: false };
  let shown = all, visible = [];
  const OPERATORS = { "=": (a, b) => String(a) === b || Number(a) === Number(b), "<": (a, b) => number(a) < b, ">": (a, b) => number(a) > b,
    "<=": (a, b) => number(a) <= b, ">=": (a, b) => number(a) >= b };
  const haystack = [];
  function searched(row) {
    return haystack[row] ??= columns.filter((c) => !c.numeric && c.group !== "environment")
      .map((c) => c.at(row) ?? "").join("\n").toLowerCase() + "\n" + Object.values(run).map((c) => c.at(row) ?? "").join("\n");
  }
  // What is searched is gathered before the first key, some rows at a time.
  function gather(from) {
    for (let row = from; row < Math.min(from + 500, all.length); row++) searched(row);
    if (from + 500 < all.length) setTimeout(() => gather(from + 500), 20);
  }
  function columnOf(name) {
    const fits = (c) => [c.name, c.name.split(" ")[0], c.name.split(".").at(-1)].includes(name);
    return columns.find((c) => c.name === name) ?? columns.find(fits);
  }
  function condition(word) {
    const [, name, operator, value] = /^([\w.:-]+?)(<=|>=|<|>|=)(.+)$/.exec(word) ?? [];
    const column = name && columnOf(name);
    if (column) return (row) => { const v = column.at(row); return v != null && OPERATORS[operator](v, value); };
    return (row) => searched(row).includes(word.toLowerCase());
  }
  function filterRows() {
    const conditions = state.text.split(/\s+/).filter(Boolean).map(condition);
    for (const [name, value] of Object.entries(state.choices)) if (value) conditions.push((row) => text(name, row) === value);
    shown = conditions.length ? all.filter((row) => conditions.every((fits) => fits(row))) : all;
  }
  function sortRows() {
    const c = state.sort;
    if (!c) return;
    const sign = state.down ? -1 : 1;
    const keys = c.numeric ? (row) => number(c.at(row)) : (row) => String(c.at(row) ?? "");
    shown = [...shown].sort((a, b) => {
      if (lacks(c, a) || lacks(c, b)) return lacks(c, a) - lacks(c, b) || a - b;
      const x = keys(a), y = keys(b);
      return sign * (c.numeric ? x - y : x.localeCompare(y, "en", { numeric: true })) || a - b;
    });
  }
  const lacks = (c, row) => c.at(row) == null || (c.numeric && Number.isNaN(number(c.at(row))));
  function differs(c) {
    if ("value" in c || shown.length < 2) return shown.length < 2 && shown.length > 0 && c.at(shown[0]) != null;
    const first = c.at(shown[0]);
    return shown.some((row) => c.at(row) !== first);
  }
  const ALWAYS = ["key"], NEVER = ["artefact", "label", "command"];
  function chooseColumns() {
    const first = run.key ? [run.key, ...columns.filter((c) => c !== run.key)] : columns;
    visible = first.filter((c) => state.groups.has(c.group) && !(c.group === "run" && NEVER.includes(c.name))
      && ((c.group === "run" && ALWAYS.includes(c.name)) || (state.differing ? differs(c) : shown.some((row) => c.at(row) != null))));
  }

  // -- the table: only the rows in sight are in the document -------------------------------------
  const HEIGHT = 30, SPARE = 10;
  const table = el("table"), scroll = el("div", { id: "scroll", tabindex: 0, role: "region", "aria-label": "Table of runs and points", scroll: () => requestAnimationFrame(paintRows) }, table);
  const count = el("p", { class: "note", role: "status", "aria-live": "polite" });
  let body = el("tbody"), painted = "";
  function widthOf(c) {
    const step = Math.max(1, Math.floor(shown.length / 200));
    let longest = Math.min(16, Math.max(...c.name.split(/[ _]/).map((w) => w.length)) + 2);
    for (let i = 0; i < shown.length; i += step) longest = Math.max(longest, cell(c, shown[i]).length);
    return c.name === "key" ? 136 : Math.min(300, longest * 8 + 22);
  }
  function paintHead() {
    const widths = visible.map(widthOf);
    const group = el("colgroup", {}, ...widths.map((w) => { const col = el("col"); col.style.width = `${w}px`; return col; }));
    const heads = visible.map((c) => el("th", { scope: "col", class: c.numeric ? "number" : null,
      "aria-sort": state.sort === c ? (state.down ? "descending" : "ascending") : null },
      el("button", { type: "button", click: () => { state.down = state.sort === c && !state.down; state.sort = c; refresh(false); } },
        c.name.replaceAll("_", " ") + (state.sort === c ? (state.down ? " ▼" : " ▲") : ""))));
    body = el("tbody");
    table.replaceChildren(group, el("thead", {}, el("tr", {}, ...heads)), body);
    table.setAttribute("aria-rowcount", shown.length + 1);
    table.style.width = `${widths.reduce((a, b) => a + b, 0)}px`;
    painted = "";
  }
  function rowOf(row, place) {
    const cells = visible.map((c) => {
      if (c === run.key) return el("td", {}, el("button", { type: "button", class: "open", title: "Everything about this row", click: () => details(row) }, text("key", row).slice(0, 8)), " ",
        el("button", { type: "button", title: text("command", row), "aria-label": `Copy the command of ${called(row)}`, click: (e) => copy(text("command", row), e.target) }, "copy"));
      const value = cell(c, row);
      return el("td", { class: c.numeric ? "number" : null, title: value.length > 36 ? value : null }, value);
    });
    return el("tr", { "aria-rowindex": place + 2 }, ...cells);
  }
  const space = (rows) => { const td = el("td", { colspan: Math.max(1, visible.length) }); td.style.height = `${rows * HEIGHT}px`; return el("tr", { class: "space", "aria-hidden": "true" }, td); };
  function paintRows(from, to) {
    if (!Number.isInteger(from) || !Number.isInteger(to)) {
      from = Math.max(0, Math.floor(scroll.scrollTop / HEIGHT) - SPARE);
      to = Math.min(shown.length, from + Math.ceil((scroll.clientHeight || 600) / HEIGHT) + 2 * SPARE);
    }
    if (painted === `${from} ${to}`) return;
    painted = `${from} ${to}`;
    const held = document.activeElement?.closest?.("tr")?.getAttribute("aria-rowindex");
    const nodes = shown.slice(from, to).map((row, i) => rowOf(row, from + i));
    body.replaceChildren(space(from), ...nodes, space(shown.length - to));
    if (held) body.querySelector(`[aria-rowindex="${held}"] button`)?.focus({ preventScroll: true });
  }
  addEventListener("beforeprint", () => paintRows(0, Math.min(shown.length, 500)));
  addEventListener("afterprint", () => paintRows());

  // -- one row in full -------------------------------------------------------------------------
  async function copy(value, button) {
    try { await navigator.clipboard.writeText(value); } catch {
      const area = el("textarea", {}, value);
      (byId("details").open ? byId("details") : document.body).append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    const before = button.textContent;
    button.textContent = "✓"; button.focus();
    setTimeout(() => { button.textContent = before; }, 900);
  }
  const GROUPS = { usual: "Metrics", metrics: "More metrics", plan: "Plan against measured", settings: "Settings", environment: "Environment", run: "Run" };
  function details(row) {
    const parts = Object.entries(GROUPS).flatMap(([group, title]) => {
      const told = columns.filter((c) => c.group === group && c.at(row) != null && c.name !== "command");
      if (!told.length) return [];
      const lines = told.map((c) => el("tr", {}, el("th", { scope: "row" }, c.name), el("td", {}, cell(c, row))));
      return [el("h3", {}, title), el("table", {}, ...lines)];
    });
    const dialog = byId("details");
    dialog.replaceChildren(el("div", { class: "bar" }, el("h2", {}, `${text("label", row)} ${text("point", row)}`), el("button", { type: "button", click: () => dialog.close() }, "Close")),
      el("pre", {}, el("code", {}, text("command", row))), el("button", { type: "button", click: (e) => copy(text("command", row), e.target) }, "Copy the command"), ...parts);
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  // -- controls --------------------------------------------------------------------------------
  function choice(name) {
    const values = [...new Set(all.map((row) => text(name, row)))].sort();
    if (values.length < 2) return null;
    return labelled(name, el("select", { change: (e) => { state.choices[name] = e.target.value; refresh(); } },
      option("", "all", true), ...values.map((v) => option(v, v || "none"))));
  }
  function toggle(name, on, change) {
    return labelled(null, el("input", { type: "checkbox", checked: on, change: (e) => { change(e.target.checked); refresh(false); } })).appendChild(document.createTextNode(name)).parentNode;
  }
  const groupToggle = (name, title) => columns.some((c) => c.group === name)
    ? toggle(title, state.groups.has(name), (on) => state.groups[on ? "add" : "delete"](name)) : null;
  const search = el("input", { type: "search", "aria-label": "Filter the rows", placeholder: "Filter: words, rank=8, loss<2.5", spellcheck: "false", input: (e) => { state.text = e.target.value; refresh(); } });
  function controls() {
    return [el("div", { class: "controls" }, search, ...["stage", "method", "model", "dataset"].map(choice)),
      el("div", { class: "controls" }, toggle("Only what differs", true, (on) => { state.differing = on; }), groupToggle("metrics", "All metrics"),
        groupToggle("settings", "Settings"), groupToggle("plan", "Plan"), groupToggle("environment", "Environment"), count)];
  }
  let later = 0;
  function refresh(filtered = true) {
    filterRows(); sortRows(); chooseColumns();
    if (filtered) scroll.scrollTop = 0;
    paintHead(); paintRows();
    count.textContent = `${shown.length.toLocaleString("en")} of ${plural(all.length, "row")}, ${plural(visible.length, "column")}`;
    if (!filtered) return;
    clearTimeout(later);
    later = setTimeout(() => { charts.forEach((c) => c.paint()); document.documentElement.dataset.ready = ""; }, 150);
  }

  // -- charts ----------------------------------------------------------------------------------
  const MOST = 3000, KEYED = 300, FOLDED = 24;
  const tip = el("div", { id: "tip", hidden: true });
  function say(node, words, row) {
    const show = () => { const box = node.getBoundingClientRect(); tip.textContent = words; tip.hidden = false;
      tip.style.left = `${Math.max(4, Math.min(box.left + 12, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${Math.max(4, box.top - tip.offsetHeight - 8)}px`; };
    const hide = () => { tip.hidden = true; };
    fill(node, { mouseenter: show, mouseleave: hide, focus: show, blur: hide, "aria-label": words }, []);
    if (row != null) fill(node, { "data-row": row, role: "button", click: () => details(row), keydown: (e) => { if (e.key === "Enter") details(row); } }, []);
    return node;
  }
  const SHAPES = ["M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0Z", "M-4-4H4V4H-4Z", "M0-5L5 0L0 5L-5 0Z", "M-5 4L0-5L5 4Z", "M-5-4L0 5L5-4Z",
    "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z", "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z", "M-2 0A2 2 0 1 0 2 0A2 2 0 1 0-2 0Z"];
  const mark = (k, x, y) => draw("path", { class: `fill k${k}`, d: SHAPES[k], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
  function legend(names, lines = false) {
    const line = (k) => lines ? draw("path", { class: `path stroke k${k}`, d: "M-18 0H18" }) : null;
    return el("ul", { class: "legend" }, ...names.flatMap((name, k) => el("li", { class: lines ? "lines" : null }, draw("svg", { viewBox: lines ? "-18 -7 36 14" : "-7 -7 14 14", "aria-hidden": "true" }, ...[line(k), mark(k, 0, 0)].filter(Boolean)), ` ${name}`)));
  }
  // Of a column, how often each name is in the whole table, most frequent first.
  const ranked = {};
  const ranks = (column) => ranked[column] ??= new Map([...grouped(all, (row) => text(column, row))].sort((a, b) => b[1].length - a[1].length || (a[0] < b[0] ? -1 : 1)).map(([name], i) => [name, i]));
  // The colour and shape of each name: its own in all charts where it is frequent, else a free one;
  // of more than eight, the last is for all but the seven most frequent.
  function keyed(names, column) {
    const rank = ranks(column), order = [...new Set(names)].sort((a, b) => rank.get(a) - rank.get(b));
    const many = order.length > 8, most = many ? 7 : 8, places = new Map(), named = [];
    const put = (name, k) => { places.set(name, k); named[k] = name; };
    for (const name of order) if (rank.get(name) < most) put(name, rank.get(name));
    for (const name of order) {
      if (places.has(name)) continue;
      let free = 0;
      while (free < most && named[free] != null) free++;
      if (free < most) put(name, free); else places.set(name, 7);
    }
    if (many) named[7] = `${order.length - 7} others`;
    return { named, of: (name) => places.get(name) };
  }
  function axis(values, log, unit = "") {
    const finite = values.filter(Number.isFinite), bytes = unit.startsWith("bytes");
    let low = Math.min(...finite), high = Math.max(...finite);
    if (log && low > 0 && high / low >= 4) {
      const base = bytes ? 2 : 10, log_ = (v) => Math.log(v) / Math.log(base), span = log_(high / low);
      const a = log_(low) - 0.04 * span, b = log_(high) + 0.04 * span, within = bytes || span > 3 ? [1] : [1, 2, 5];
      const step = Math.max(1, Math.ceil(span / 7)), ticks = [];
      for (let e = Math.floor(a); e <= b; e++) if (e % step === 0) ticks.push(...within.map((m) => m * base ** e));
      return { at: (v) => (log_(v) - a) / (b - a), ticks: ticks.filter((t) => log_(t) >= a && log_(t) <= b) };
    }
    if (!(high > low)) { low -= Math.abs(low) * 0.05 || 1; high += Math.abs(high) * 0.05 || 1; }
    const pad = (high - low) * 0.04, factor = bytes ? scale(high, unit)[0] : 1;
    low -= pad; high += pad;
    const rough = (high - low) / 5 / factor, power = 10 ** Math.floor(Math.log10(rough));
    const step = factor * [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough), ticks = [];
    for (let t = Math.ceil(low / step); t * step <= high; t++) ticks.push(t * step);
    return { at: (v) => (v - low) / (high - low), ticks };
  }
  const tickText = (t, unit) => { const [factor, prefix] = scale(t, unit); return `${+(t / factor).toPrecision(6)} ${prefix}`.trim(); };
  // One chart: marks {x, y, low, high, k, words, row}, paths {points, k, class}.
  function plot(box, { title, marks = [], paths = [], xName, yName, xUnit = "", yUnit = "", xLog, yLog, xTicks }) {
    const inPaths = paths.flatMap((p) => p.points);
    const xs = [...marks, ...inPaths].map((m) => m.x), ys = [...marks.flatMap((m) => [m.y, m.low, m.high]), ...inPaths.map((m) => m.y)].filter((v) => v != null);
    if (!xs.length) { box.replaceChildren(el("p", { class: "note" }, "None of the shown rows has both values.")); return; }
    const W = Math.max(300, box.clientWidth || 700), H = 340, L = 76, B = 44, T = 10, R = 14;
    const ax = axis(xs, xLog, xUnit), ay = axis(ys, yLog, yUnit);
    const px = (v) => L + ax.at(v) * (W - L - R), py = (v) => H - B - ay.at(v) * (H - B - T);
    const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `${title}: ${yName} over ${xName}, ${plural(marks.length || paths.length, marks.length ? "point" : "line")}` });
    for (const t of ay.ticks) svg.append(draw("line", { class: "grid", x1: L, x2: W - R, y1: py(t), y2: py(t) }), draw("text", { class: "soft", x: L - 6, y: py(t) + 4, "text-anchor": "end" }, tickText(t, yUnit)));
    let free = -Infinity;
    for (const t of xTicks ?? ax.ticks) {
      const label = typeof t === "object" ? t.label : tickText(t, xUnit), x = px(typeof t === "object" ? t.x : t), half = label.length * 3.6;
      if (x - half < free) continue;
      free = x + half + 6;
      svg.append(draw("line", { class: "axis", x1: x, x2: x, y1: H - B, y2: H - B + 4 }), draw("text", { class: "soft", x: Math.min(x, W - half), y: H - B + 17, "text-anchor": "middle" }, label));
    }
    svg.append(draw("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }),
      draw("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, xName), draw("text", { transform: `translate(12 ${(H - B + T) / 2}) rotate(-90)`, "text-anchor": "middle" }, yName));
    for (const p of paths) svg.append(say(draw("path", { class: p.class ?? `path stroke k${p.k} ${p.kind ?? ""}`, opacity: p.opacity, d: p.points.map((m, i) => `${i ? "L" : "M"}${px(m.x).toFixed(1)} ${py(m.y).toFixed(1)}`).join("") }), p.words ?? title));
    for (const m of marks.slice(0, MOST)) {
      if (m.low != null && m.high != null && marks.length <= KEYED) svg.append(draw("line", { class: `stroke k${m.k}`, x1: px(m.x), x2: px(m.x), y1: py(m.low), y2: py(m.high), opacity: 0.7 }));
      const node = say(mark(m.k, px(m.x), py(m.y)), m.words, m.row);
      if (marks.length <= KEYED) node.setAttribute("tabindex", 0);
      svg.append(node);
    }
    box.replaceChildren(svg, ...(marks.length > MOST ? [el("p", { class: "note" }, `The first ${MOST} of ${marks.length} points; filter to see others.`)] : []));
  }
  const charts = [];
  function section(id, title, ...children) {
    byId("charts").append(el("section", { id }, el("h2", {}, title), ...children));
  }
  function chart(id, title, controls, paint, note = "") {
    const box = el("figure"), key = el("div"), warning = el("p", { class: "note" }, note);
    section(id, title, el("div", { class: "controls" }, ...controls), warning, box, key);
    charts.push({ paint: () => paint(box, key, warning) });
    return charts.at(-1);
  }
  const repaint = (place) => ({ change: () => charts[place].paint() });
  function menu(name, choices, chosen) {
    const select = el("select", repaint(charts.length), ...choices.map(([value, label]) => option(value, label, value === chosen)));
    return [labelled(name, select), select];
  }
  const metrics = columns.map((c, i) => [i, c]).filter(([, c]) => isMetric(c) && c.numeric);
  const listed = metrics.map(([i, c]) => [String(i), c.name.replaceAll("_", " ")]);
  // Of the named metrics the one that most rows have.
  const filled = new Map(metrics.map(([, c]) => [c, all.reduce((n, row) => n + (c.at(row) != null), 0)]));
  function preferred(...names) {
    const fits = metrics.filter(([, c]) => names.includes(c.name.split(" ")[0]));
    return String((fits.length ? fits : metrics).reduce((a, b) => filled.get(b[1]) > filled.get(a[1]) ? b : a)[0]);
  }
  const lowerIsBetter = (c) => c.better !== "higher";
  const valueWords = (c, row, v) => `${c.name}: ${v == null ? cell(c, row) : readable(v, c.unit)}`;

  // A point of one artefact may be measured by several runs, quality by one and speed by another: a
  // value that its row lacks is taken from the others where they all say the same.
  function pointsOf(rows, cx, cy) {
    const places = new Map();
    for (const row of rows) {
      const id = `${text("artefact", row)} ${text("point", row)} ${text("dataset", row)}`;
      places.has(id) ? places.get(id).push(row) : places.set(id, [row]);
    }
    const found = [];
    for (const members of places.values()) {
      const value = (c, row) => { const own = c.at(row); if (own != null) return number(own);
        const others = new Set(members.map((r) => c.at(r)).filter((v) => v != null)); return others.size === 1 ? number([...others][0]) : NaN; };
      for (const row of members) {
        const x = value(cx, row), y = value(cy, row);
        if (Number.isFinite(x) && Number.isFinite(y) && (cy.at(row) != null || cx.at(row) != null)) found.push({ row, x, y });
      }
    }
    const seen = new Set();
    return found.filter((p) => { const id = `${text("artefact", p.row)} ${text("point", p.row)} ${p.x} ${p.y}`; return !seen.has(id) && seen.add(id); });
  }
  function front(points, downX, downY) {
    const sx = downX ? 1 : -1, sy = downY ? 1 : -1;
    let best = Infinity;
    return [...points].sort((a, b) => sx * (a.x - b.x) || sy * (a.y - b.y)).filter((p) => sy * p.y < best && ((best = sy * p.y), true));
  }
  const grouped = (items, name) => { const found = new Map(); for (const i of items) { const k = name(i); found.has(k) ? found.get(k).push(i) : found.set(k, [i]); } return found; };
  // An artefact that runs used in several ways at one point is a line for each of them.
  const apart = (group) => new Set(group.map((p) => text("point", p.row))).size < group.length ? [...grouped(group, (p) => text("key", p.row)).values()] : [group];
  function mixed(rows) {
    const several = ["dataset", "model"].map((n) => [n, new Set(rows.map((r) => text(n, r))).size]).filter(([, n]) => n > 1);
    return several.length ? `The shown rows are of ${several.map(([n, c]) => `${c} ${n}s`).join(" and ")}, whose numbers may not compare: filter to one.` : "";
  }
  const pickGroups = ["method", "model", "dataset", "stage", "seed"].filter((n) => run[n]).map((n) => [n, n]);

  if (data.forest.length) {
    const [pick, select] = menu("metric", data.forest.map((f, i) => [String(i), f.title]), "0");
    const [order, by] = menu("order", [["difference", "by difference"], ["table", "as compared"]], "difference");
    let open = false;
    const here = chart("forest", "Paired differences", [pick, order], (box, key, warning) => {
      const f = data.forest[Number(select.value)], keys = new Set(shown.map((row) => text("key", row)));
      const rows = f.rows.filter((r) => r[6].split("+").some((k) => keys.has(k)));
      if (by.value === "difference") rows.sort((a, b) => (f.better === "higher" ? -1 : 1) * (number(a[1]) - number(b[1])));
      const some = open ? rows : rows.slice(0, FOLDED);
      const few = some.length < f.rows.length ? ` ${some.length} of them are shown.` : "";
      warning.textContent = `Against ${f.against}: value minus its value${f.better ? `, ${f.better} is better` : ""}. 95 % intervals${f.rows.length > 1 ? `, Holm's correction over all ${f.rows.length} rows` : ""}.${few}`;
      if (!rows.length) { box.replaceChildren(el("p", { class: "note" }, "None of the shown rows was tested.")); key.replaceChildren(); return; }
      paintForest(box, f, some);
      const fold = () => { open = !open; here.paint(); key.querySelector("button")?.focus(); };
      key.replaceChildren(forestLegend(f), ...(rows.length > FOLDED ? [el("button", { type: "button", class: "more", "aria-expanded": String(open), click: fold }, open ? `Show ${FOLDED} rows` : `Show all ${rows.length} rows`)] : []));
    });
  }
  function forestMark(f, finding, x, y) {
    const differs_ = finding === "lower" || finding === "higher", k = !differs_ || !f.better ? 0 : finding === f.better ? 2 : 1;
    const dot = mark(k, x, y);
    if (!differs_) { dot.setAttribute("class", `stroke k${k}`); dot.setAttribute("fill", "none"); }
    return [dot, k];
  }
  function forestLegend(f) {
    const kinds = f.better ? [[f.better, "better"], [f.better === "lower" ? "higher" : "lower", "worse"]] : [["lower", "differs"]];
    return el("ul", { class: "legend" }, ...[...kinds, ["", "cannot be told apart"]].map(([finding, name]) =>
      el("li", {}, draw("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, forestMark(f, finding, 0, 0)[0]), ` ${name}`)));
  }
  function paintForest(box, f, rows) {
    const W = Math.max(300, box.clientWidth || 700), wide = W > 700, L = wide ? Math.min(460, W * 0.4) : 8, step = wide ? 24 : 40, R = wide ? 216 : 14, T = 20, H = T + rows.length * step + 48;
    const ax = axis([0, ...rows.flatMap((r) => [r[2], r[3]].map(number))], false);
    const px = (v) => L + Math.max(0, Math.min(1, ax.at(v))) * (W - L - R);
    const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `Paired differences: ${f.title}, ${plural(rows.length, "row")}` });
    for (const t of ax.ticks) svg.append(draw("line", { class: "grid", x1: px(t), x2: px(t), y1: T - 4, y2: H - 44 }),
      ...[T - 8, H - 28].map((y) => draw("text", { class: "soft", x: px(t), y, "text-anchor": "middle" }, tickText(t, ""))));
    svg.append(draw("line", { class: "zero", x1: px(0), x2: px(0), y1: T - 4, y2: H - 44 }),
      draw("text", { x: (L + W - R) / 2, y: H - 8, "text-anchor": "middle" }, `difference${f.unit ? ` (${f.unit})` : ""}`));
    rows.forEach((r, i) => {
      const [name, value, low, high, p, finding] = r, y = T + i * step + (wide ? 13 : 28), long = Math.floor((wide ? L : W) / 6.6);
      const [dot, good] = forestMark(f, finding, px(value), y), said = `${readable(value)} [${readable(low)}, ${readable(high)}]`;
      svg.append(draw("text", { x: wide ? L - 10 : 8, y: wide ? y + 4 : y - 12, "text-anchor": wide ? "end" : "start" }, name.length > long ? `${name.slice(0, long - 15)}…${name.slice(-14)}` : name, draw("title", {}, name)),
        draw("line", { class: `stroke k${good}`, x1: px(low), x2: px(high), y1: y, y2: y, "stroke-width": 2 }));
      if (wide) svg.append(draw("text", { class: "soft", x: W, y: y + 4, "text-anchor": "end" }, said));
      dot.setAttribute("tabindex", 0);
      svg.append(say(dot, `${name}\n${said} ${f.unit}\np ${p < 0.001 ? "< 0.001" : p.toFixed(3)}: ${finding}`));
    });
    box.replaceChildren(svg);
  }

  if (metrics.length) {
    const y = menu("quality", listed, preferred("accuracy", "acc", "loss", "perplexity"));
    const x = menu("against", listed, preferred("weight_bytes", "artefact_bytes", "decode_tokens_per_second"));
    const k = menu("colour", pickGroups, "method");
    const log = el("input", { type: "checkbox", checked: true, ...repaint(charts.length) });
    chart("pareto", "Quality against cost", [y[0], x[0], k[0], el("label", {}, log, "log scale")], (box, key, warning) => {
      const cx = columns[x[1].value], cy = columns[y[1].value], points = pointsOf(shown, cx, cy);
      const colours = keyed(points.map((p) => text(k[1].value, p.row)), k[1].value);
      const colour = (p) => colours.of(text(k[1].value, p.row));
      const marks = points.map((p) => ({ ...p, k: colour(p), low: cy.low?.[p.row], high: cy.high?.[p.row], words: `${called(p.row)}\n${valueWords(cx, p.row, p.x)}\n${valueWords(cy, p.row, cy.at(p.row) == null ? p.y : null)}` }));
      const joined = [...grouped(marks, (p) => text("artefact", p.row)).values()].flatMap(apart).filter((g) => g.length > 1)
        .map((g) => ({ points: g.sort((a, b) => a.x - b.x), k: g[0].k, opacity: 0.6, words: `Points of ${called(g[0].row)}` }));
      const fronts = [...grouped(points, (p) => `${text("dataset", p.row)} ${text("model", p.row)}`)].map(([name, g]) => ({ points: front(g, lowerIsBetter(cx), lowerIsBetter(cy)), class: "front", words: `Front of ${name || "all rows"}` })).filter((g) => g.points.length > 1);
      plot(box, { title: "Quality against cost", marks, paths: [...joined, ...fronts], xName: cx.name.replaceAll("_", " "), yName: cy.name.replaceAll("_", " "), xUnit: cx.unit, yUnit: cy.unit, xLog: log.checked, yLog: log.checked });
      key.replaceChildren(legend(colours.named));
      const side = (c) => `${c.name.split(" ")[0].replaceAll("_", " ")}: ${lowerIsBetter(c) ? "lower" : "higher"} is better`;
      warning.textContent = `Dashed: the Pareto front (${side(cx)}, ${side(cy)}). Lines join the points of one artefact. ${mixed(points.map((p) => p.row))}`;
    });
  }

  const POINT = /^(\D*)(\d+(?:\.\d+)?)(.*)$/;
  if (metrics.length && run.point) {
    const y = menu("metric", listed, preferred("loss", "accuracy", "acc"));
    const found = all.map((row) => POINT.exec(text("point", row))).filter(Boolean).map((m) => m[1]), NAMES = { r: "rank", d: "depth", b: "bits" };
    const kinds = [...new Set(found)].sort(), frequent = (names) => kinds.reduce((a, b) => names.filter((n) => n === b).length > names.filter((n) => n === a).length ? b : a);
    const x = menu("points", kinds.map((p) => [p, NAMES[p] ? `${NAMES[p]} (${p}…)` : `${p}…`]), kinds.length ? frequent(found) : "");
    const k = menu("colour", pickGroups, "method");
    chart("points", "Over operating points", [y[0], x[0], k[0]], (box, key, warning) => {
      const cy = columns[y[1].value], there = shown.map((row) => POINT.exec(text("point", row))?.[1]).filter((p) => p != null);
      if (there.length && !there.includes(x[1].value)) x[1].value = frequent(there);
      const marks = shown.map((row) => ({ row, found: POINT.exec(text("point", row)), y: number(cy.at(row)) })).filter((p) => p.found?.[1] === x[1].value && Number.isFinite(p.y))
        .map((p) => ({ ...p, x: Number(p.found[2]) }));
      const several = [...grouped(marks, (p) => `${text("key", p.row)}${p.found[3]}`).values()].filter((g) => g.length > 1);
      const kept = several.flat(), colours = keyed(kept.map((p) => text(k[1].value, p.row)), k[1].value);
      for (const p of kept) Object.assign(p, { k: colours.of(text(k[1].value, p.row)), low: cy.low?.[p.row], high: cy.high?.[p.row], words: `${called(p.row)}\n${valueWords(cy, p.row)}` });
      const ticks = [...new Map(kept.map((p) => [p.x, { x: p.x, label: `${p.found[1]}${p.found[2]}` }])).values()].sort((a, b) => a.x - b.x);
      plot(box, { title: "Over operating points", marks: kept, paths: several.map((g) => ({ points: g.sort((a, b) => a.x - b.x), k: g[0].k, words: called(g[0].row) })), xName: NAMES[x[1].value] ?? "operating point", yName: cy.name.replaceAll("_", " "), yUnit: cy.unit, xLog: true, xTicks: ticks });
      key.replaceChildren(legend(colours.named, true));
      warning.textContent = `A line for each run. ${mixed(kept.map((p) => p.row))}`;
    });
  }

  if (data.curves.length) {
    const rowsByKey = new Map(all.map((row) => [text("key", row), row]));
    const k = menu("colour", pickGroups, "method");
    chart("curves", "Loss over training", [k[0]], (box, key, warning) => {
      const keys = new Set(shown.map((row) => text("key", row)));
      const here = data.curves.filter((c) => keys.has(c.key)), colour = (c) => text(k[1].value, rowsByKey.get(c.key));
      const colours = keyed(here.map(colour), k[1].value);
      const line = (c, kind) => ({ points: c[kind][0].map((x, i) => ({ x, y: c[kind][1][i] })), k: colours.of(colour(c)), kind, words: `${called(rowsByKey.get(c.key))}, ${kind}` });
      const paths = here.flatMap((c) => ["training", "validation"].filter((kind) => c[kind]).map((kind) => line(c, kind)));
      const ends = paths.map((p) => ({ ...p.points.at(-1), k: p.k, words: p.words, row: null }));
      plot(box, { title: "Loss over training", paths, marks: ends, xName: "optimiser step", yName: "loss that is minimised" });
      key.replaceChildren(legend(colours.named, true));
      const thick = paths.some((p) => p.kind === "validation") ? " Thick lines: validation." : "";
      warning.textContent = `${here.length} of the shown runs have a folder here; a place is the mean over a few steps where a run has many. The loss is the method's own: nats per token, or per row where it ranks or classifies.${thick}`;
    });
  }

  const phases = [...new Set(columns.filter((c) => c.group === "plan").map((c) => c.name.split(": ")[0]))].filter((p) => columnOf(`${p}: predicted bytes`)?.numeric && columnOf(`${p}: measured bytes`)?.numeric);
  if (phases.length) {
    const of = Object.fromEntries(phases.map((p) => [p, [columnOf(`${p}: predicted bytes`), columnOf(`${p}: measured bytes`), columnOf(`${p}: error`)]]));
    chart("plan", "Plan against measured", [], (box, key, warning) => {
      const firsts = [...grouped(shown, (row) => text("key", row)).values()].map((g) => g[0]);
      const expected = (p, row) => number(of[p][1].at(row)) * (1 + number(of[p][2]?.at(row) ?? NaN));
      const told = (p, row) => `${called(row)}, ${p}\npredicted ${readable(of[p][0].at(row), "bytes")}, with the process ${readable(expected(p, row), "bytes")}\nmeasured ${readable(of[p][1].at(row), "bytes")}, error ${(100 * number(of[p][2]?.at(row))).toFixed(1)} %`;
      const marks = phases.flatMap((p, k) => firsts.map((row) => ({ row, k: Math.min(k, 7), x: expected(p, row), y: number(of[p][1].at(row)), words: told(p, row) }))).filter((m) => m.x > 0 && m.y > 0);
      const ends = marks.length ? [Math.min(...marks.map((m) => Math.max(m.x, m.y))), Math.max(...marks.map((m) => Math.min(m.x, m.y)))] : [];
      plot(box, { title: "Plan against measured", marks, paths: ends[0] < ends[1] ? [{ points: ends.map((v) => ({ x: v, y: v })), class: "zero", words: "as predicted" }] : [], xName: "predicted peak and what the process had before", yName: "measured peak", xUnit: "bytes", yUnit: "bytes", xLog: true, yLog: true });
      key.replaceChildren(legend(phases));
      warning.textContent = "Peak memory by phase. Dashed: as predicted; above it, more was needed.";
    });
  }

  // -- begin -----------------------------------------------------------------------------------
  byId("grid").append(...controls(), scroll);
  document.body.append(tip);
  addEventListener("scroll", () => { tip.hidden = true; }, true);
  byId("plain").hidden = true;
  byId("grid").hidden = byId("charts").hidden = byId("sections").hidden = false;
  byId("sections").append(...[...document.querySelectorAll("section[id]")].map((s) => el("a", { href: `#${s.id}` }, s.querySelector("h2").textContent)));
  refresh();
  setTimeout(() => gather(0), 400);
  let width = innerWidth;
  addEventListener("resize", () => { painted = ""; paintRows(); if (innerWidth === width) return; width = innerWidth; charts.forEach((c) => c.paint()); });
})();
