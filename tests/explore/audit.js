// Problems of a page for people who read with a screen reader, the keyboard, or little contrast: a list of sentences.
() => {
  const problems = [];
  const visible = e => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const passedOver = e => !visible(e) || e.closest("[aria-hidden=true], :disabled");
  const named = e => [...e.querySelectorAll("[aria-label], img")].map(x => x.getAttribute("aria-label") || x.alt).join("");
  const name = e => [
    e.getAttribute("aria-label") || "",
    e.alt || "",
    e.labels ? [...e.labels].map(label => label.textContent).join("") : "",
    (e.getAttribute("aria-labelledby") || "").split(" ").map(id => document.getElementById(id)?.textContent ?? "").join(""),
    e.matches("button, a, summary, tr") ? e.textContent + named(e) : "",
  ].join("").trim();

  const check = (selector, problem) => {
    for (const e of document.querySelectorAll(selector))
      if (!passedOver(e) && !name(e)) problems.push(`${problem}: ${e.outerHTML.slice(0, 90)}`);
  };
  check("svg, canvas, img", "no text alternative");
  check("button, select, input, a[href], [tabindex='0']", "no label");

  const rgba = css => { const [r, g, b, a = 1] = css.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const linear = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const background = e => {
    const layers = [];
    for (let place = e; place && (!layers.length || layers[0][3] < 1); place = place.parentElement)
      layers.unshift(rgba(getComputedStyle(place).backgroundColor));
    return layers.reduce((under, layer) => under.map((v, i) => v + layer[3] * (layer[i] - v)), [255, 255, 255]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!text || e.matches("script, style, option, noscript, title") || passedOver(e)) continue;
    const style = getComputedStyle(e), front = luminance(rgba(e instanceof SVGElement ? style.fill : style.color));
    const back = luminance(background(e)), ratio = (Math.max(front, back) + .05) / (Math.min(front, back) + .05);
    if (ratio < 4.5) problems.push(`contrast ${ratio.toFixed(2)}: ${e.tagName} ${text.slice(0, 40)}`);
  }
  return problems;
}
