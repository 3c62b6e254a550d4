"use strict";
// Draws plotly figures so that nothing is cut off: panels that would be too narrow stand below one another, the legend of a narrow figure
// stands below it, and figures fit the paper when the page is printed.
const plots = (() => {
  const PANEL = 270, NARROW = 640, LEGEND = 900, PAPER = 680, BUTTONS = 30; // pixels: least width of a panel, of a roomy figure, of one with its legend on the right; width on paper; height of the buttons
  const CONFIG = {displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
  const drawn = new Map(); // element -> its figure as given

  const axes = (layout, letter) => Object.keys(layout).filter((key) => key.startsWith(`${letter}axis`))
    .sort((a, b) => Number(a.slice(5) || 1) - Number(b.slice(5) || 1));
  /** Whether the panels of a figure stand side by side in one row. */
  const inARow = (layout) => {
    const x = axes(layout, "x"), starts = x.map((key) => layout[key].domain?.[0] ?? 0);
    return x.length > 1 && axes(layout, "y").length === x.length && starts.every((start, i) => i === 0 || start > starts[i - 1]);
  };

  /** A text broken into lines of at most so many characters, where there are blanks. */
  const wrapped = (text, most) => text.split(" ").reduce((lines, word) => {
    if (lines.length && (lines.at(-1) + " " + word).length <= most) lines.push(`${lines.pop()} ${word}`);
    else lines.push(word);
    return lines;
  }, []).join("<br>");

  /** The layout for a width in pixels. */
  function fitted(figure, width) {
    const layout = structuredClone(figure.layout ?? {}), names = figure.data.filter((t) => t.name && t.showlegend !== false);
    let height = layout.height ?? 420;
    const row = inARow(layout), panels = row ? axes(layout, "x").length : 1;
    const titles = (layout.annotations ?? []).filter((a) => a.xref === "paper" && a.yref === "paper" && a.yanchor === "bottom" && !a.showarrow);
    titles.forEach((title) => { title.font = {...title.font, size: 13}; });
    layout.title = undefined; // it stands above the figure, as text that wraps
    // The panels, and their titles, begin below the buttons, which touch screens always show.
    layout.margin = {...layout.margin, t: BUTTONS + (titles.length ? 22 + 16 * Math.max(...titles.map((t) => t.text.split("<br>").length - 1)) : 0)};
    const legend = names.length > 1 && layout.showlegend !== false, below = legend && width < LEGEND;
    layout.showlegend = legend;
    if (panels > 1 && (width - (legend && !below ? 160 : 0)) / panels < PANEL) {
      const gap = 0.34 / panels, share = (1 - gap * (panels - 1)) / panels;
      axes(layout, "x").forEach((key, i) => {
        const y = layout[`y${key.slice(1)}`], top = 1 - i * (share + gap);
        layout[key] = {...layout[key], domain: [0, 1], anchor: `y${key.slice(5)}`};
        layout[`y${key.slice(1)}`] = {...y, domain: [Math.max(0, top - share), top], anchor: `x${key.slice(5)}`, showticklabels: true};
        if (titles[i]) Object.assign(titles[i], {x: 0.5, y: top});
      });
      height = 320 * panels;
    }
    if (width < NARROW) {
      layout.margin = {...layout.margin, l: Math.min(layout.margin.l ?? 60, 56), r: 12};
      layout.font = {...layout.font, size: 12};
    }
    // Names on a vertical axis are broken into lines where there is little room, and leave less room for the title below.
    const rowNames = [...new Set(figure.data.flatMap((t) => (Array.isArray(t.y) ? t.y : [])).filter((v) => typeof v === "string"))];
    const inLines = width < NARROW && rowNames.length && !layout.meta?.least_width;
    if (inLines) {
      const ticktext = rowNames.map((name) => wrapped(name, 22)), most = Math.max(...ticktext.map((text) => text.split("<br>").length));
      layout.yaxis = {...layout.yaxis, tickmode: "array", tickvals: rowNames, ticktext, tickfont: {size: 10}};
      height = Math.max(height, 130 + 14 * most * rowNames.length);
    }
    const longest = Math.min(inLines ? 22 : 60, Math.max(0, ...rowNames.map((name) => name.length)));
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
    return {...layout, width, height, autosize: false};
  }
  const available = (target) => Math.max(target.parentElement.clientWidth, Number(target.dataset.least ?? 0));
  function fit(target, width) {
    const figure = drawn.get(target);
    return Plotly.react(target, figure.data, fitted(figure, width), {...CONFIG});
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
