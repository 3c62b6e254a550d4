"use strict";
// Draws plotly figures so that nothing is cut off: panels that would be too narrow stand below one another, the legend of a narrow figure
// stands below it, and figures fit the paper when the page is printed.
const plots = (() => {
  const PANEL = 270, NARROW = 640, LEGEND = 900, PAPER = 680, BUTTONS = 30; // pixels: least width of a panel, of a roomy figure, of one with its legend on the right; width on paper; height of the buttons
  const CONFIG = {displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
  const drawn = new Map(); // element -> its figure as given

  const axes = (layout, letter) => Object.keys(layout).filter((key) => key.startsWith(`${letter}axis`))
    .sort((a, b) => Number(a.slice(5) || 1) - Number(b.slice(5) || 1));
  /** Number of panels of a figure, and how many of them stand side by side; 1 and 1 where panels share axes. */
  const grid = (layout) => {
    const x = axes(layout, "x");
    if (x.length < 2 || axes(layout, "y").length !== x.length) return [1, 1];
    return [x.length, new Set(x.map((key) => (layout[key].domain?.[0] ?? 0).toFixed(3))).size];
  };

  /** A text broken into lines of at most so many characters, where there are blanks. */
  const wrapped = (text, most) => text.split(" ").reduce((lines, word) => {
    if (lines.length && (lines.at(-1) + " " + word).length <= most) lines.push(`${lines.pop()} ${word}`);
    else lines.push(word);
    return lines;
  }, []).join("<br>");

  /** The data and the layout for a width in pixels. */
  function fitted(figure, width) {
    const layout = structuredClone(figure.layout ?? {}), names = figure.data.filter((t) => t.name && t.showlegend !== false);
    let height = layout.height ?? 420;
    const [panels, beside] = grid(layout);
    let data = figure.data;
    const titles = (layout.annotations ?? []).filter((a) => a.xref === "paper" && a.yref === "paper" && a.yanchor === "bottom" && !a.showarrow);
    titles.forEach((title) => { title.font = {...title.font, size: 13}; });
    layout.title = undefined; // it stands above the figure, as text that wraps
    // The panels, and their titles, begin below the buttons, which touch screens always show.
    layout.margin = {...layout.margin, t: BUTTONS + (titles.length ? 22 + 16 * Math.max(...titles.map((t) => t.text.split("<br>").length - 1)) : 0)};
    const legend = names.length > 1 && layout.showlegend !== false, below = legend && width < LEGEND;
    layout.showlegend = legend;
    if (beside > 1 && (width - (legend && !below ? 160 : 0)) / beside < PANEL) {
      const gap = 0.34 / panels, share = (1 - gap * (panels - 1)) / panels;
      axes(layout, "x").forEach((key, i) => {
        const y = layout[`y${key.slice(1)}`], top = 1 - i * (share + gap);
        layout[key] = {...layout[key], domain: [0, 1], anchor: `y${key.slice(5)}`};
        layout[`y${key.slice(1)}`] = {...y, domain: [Math.max(0, top - share), top], anchor: `x${key.slice(5)}`, showticklabels: true};
        if (titles[i]) Object.assign(titles[i], {x: 0.5, y: top});
      });
      data = data.map((trace) => {
        const [low, high] = layout[`yaxis${(trace.yaxis ?? "y").slice(1)}`].domain;
        return trace.colorbar ? {...trace, colorbar: {...trace.colorbar, x: 1.02, y: (low + high) / 2, len: high - low}} : trace;
      });
      height = 320 * panels;
    }
    if (width < NARROW) {
      layout.margin = {...layout.margin, l: Math.min(layout.margin.l ?? 60, 56), r: 12};
      layout.font = {...layout.font, size: 12};
    }
    // Names on a vertical axis are broken into lines where they would take half of the width, and leave less room for the title below.
    const namesOn = (key) => [...new Set(data.filter((t) => `yaxis${(t.yaxis ?? "y").slice(1)}` === key)
      .flatMap((t) => (Array.isArray(t.y) ? t.y : [])).filter((v) => typeof v === "string"))];
    const line = width < NARROW ? 22 : Math.floor(0.06 * width);
    let longest = 0;
    for (const key of new Set(["yaxis", ...axes(layout, "y")])) {
      const rows = namesOn(key), most = Math.max(0, ...rows.map((name) => name.length));
      longest = Math.max(longest, Math.min(line, most));
      if (most <= line || layout.meta?.least_width) continue;
      const ticktext = rows.map((name) => wrapped(name, line)), lines = Math.max(...ticktext.map((text) => text.split("<br>").length));
      layout[key] = {...layout[key], tickmode: "array", tickvals: rows, ticktext, tickfont: {size: width < NARROW ? 10 : 12}};
      height = Math.max(height, 130 + (width < NARROW ? 14 : 16) * lines * rows.length);
    }
    let titleLines = 1;
    for (const key of [...axes(layout, "x"), ...axes(layout, "y")]) {
      const [low, high] = layout[key].domain ?? [0, 1], text = layout[key].title?.text;
      const along = key[0] === "x" ? width - 90 - 6 * longest : height - 150;
      layout[key] = {...layout[key], automargin: true};
      if (text) {
        const broken = wrapped(text, Math.max(12, Math.floor((high - low) * along / 7)));
        layout[key].title = {...layout[key].title, text: broken, font: {size: 13}, standoff: 12};
        if (key[0] === "x") titleLines = Math.max(titleLines, broken.split("<br>").length);
      }
      if (width < NARROW) layout[key].tickfont = {size: 11, ...layout[key].tickfont};
    }
    if (below) {
      const rows = Math.ceil(names.reduce((sum, t) => sum + 60 + 7 * String(t.name).length, 0) / (width - 30)), room = 22 * rows + 16 * titleLines;
      layout.legend = {...layout.legend, orientation: "h", x: 0, xanchor: "left", y: -(50 + 16 * titleLines) / (height - 90), yanchor: "top", font: {size: 11}};
      height += room;
    }
    return [data, {...layout, width, height, autosize: false}];
  }
  const available = (target) => Math.max(target.parentElement.clientWidth, Number(target.dataset.least ?? 0));
  function fit(target, width) {
    return Plotly.react(target, ...fitted(drawn.get(target), width), {...CONFIG});
  }
  /** Draw a figure, `{data, layout}`, into an element. */
  function draw(target, figure) {
    drawn.set(target, {data: figure.data ?? [], layout: figure.layout ?? {}});
    const least = figure.layout?.meta?.least_width;
    if (least) {
      target.dataset.least = least;
      target.parentElement.classList.add("scrolls");
    }
    return fit(target, available(target));
  }
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => drawn.forEach((_, target) => fit(target, available(target))), 150); });
  addEventListener("beforeprint", () => drawn.forEach((_, target) => fit(target, PAPER)));
  addEventListener("afterprint", () => drawn.forEach((_, target) => fit(target, available(target))));
  return {draw, CONFIG};
})();
