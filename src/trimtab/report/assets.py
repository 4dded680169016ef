"""The report's style and its one script: plain text that goes into the page."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c2024;--soft:#5c6570;--rule:#e3e4e0;--grid:#ecece8;
--train:#1f6fb4;--val:#c2410c;--final:#86198f;--plan:#0f766e;--restart:#7c3aed;--switch:#3f7d20;--resume:#8a6d00;
--level:#b91c1c;--bound:#0f766e;--m1:#1f6fb4;--m2:#d98a1f;--m3:#5b8c5a;--m4:#a05195;--warn:#fff4d6;--warnline:#d9a400}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e8e9ea;--soft:#a2abb5;--rule:#32383e;
--grid:#2a2f35;--train:#6db3f2;--val:#ff9a62;--final:#e08bea;--plan:#4fd1c0;--restart:#b79bff;--switch:#93d36b;
--resume:#e0c04a;--level:#ff8080;--bound:#4fd1c0;--m1:#4f97d6;--m2:#d99a45;--m3:#6fa86e;--m4:#b673ab;
--warn:#3a3115;--warnline:#c99a1a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:2rem 1.25rem 3rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .9rem}
h3{font-size:.95rem;margin:0;font-weight:600}
p{margin:.4rem 0}
a{color:inherit}
.sub{color:var(--soft);margin:.35rem 0 0;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1rem 0 0;font-size:.9rem}
nav a{color:var(--soft);text-decoration-color:var(--rule);text-underline-offset:.25em}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1.3rem 1.4rem;margin-top:1.2rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:.6rem;margin-top:1.3rem}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.7rem .8rem}
.card b{display:block;white-space:nowrap;font-size:1.22rem;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums}
.card span{font-size:.78rem;line-height:1.4;color:var(--soft);display:block}
.says{padding-left:1.1rem;margin:0}
.says li{margin:.3rem 0}
.notice{background:var(--warn);border-left:4px solid var(--warnline);padding:.6rem .9rem;margin-top:1rem;
border-radius:4px;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.6rem 2rem}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr));gap:1.5rem 1.4rem;
margin-top:1rem}
.chart{margin:0;min-width:0}
.chart+.chart,.pair+.chart,.chart+.pair,.scroll+.chart,.chart+.scroll{margin-top:1.7rem}
.pair .chart,.many .chart{margin-top:0}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.8rem;color:var(--soft);margin:.15rem 0 .5rem;
align-items:center}
.unit{font-weight:600}
.key{display:inline-flex;align-items:center;gap:.4rem}
.key i{display:inline-block;width:1.1rem;height:0;border-top:2.5px solid currentColor}
.key i.faint{opacity:.4}
.key i.dots,.key i.ring,.key i.points{width:.6rem;height:.6rem;border-radius:50%;border:0;background:currentColor}
.key i.points{width:.35rem;height:.35rem}
.key i.ring{background:none;border:2.5px solid currentColor}
.key i.upright{width:0;height:1rem;border:0;border-left:2px dashed currentColor}
.key i.upright.switch{border-left-style:solid}
.key i.upright.resume{border-left-style:dotted}
.key i.flat{border-top-style:dashed;border-top-width:2px}
.box{position:relative;margin:0 .9rem 0 3.1rem;border-left:1px solid var(--soft);border-bottom:1px solid var(--soft);
touch-action:pan-y}
.box:focus-visible{outline:2px solid var(--train);outline-offset:3px}
.box svg{position:absolute;inset:0;width:100%;height:100%;display:block;overflow:hidden}
.box svg.over{overflow:visible;pointer-events:none}
.box path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--grid);stroke-width:1}
.line{stroke-width:1.8;stroke-linejoin:round}
.faint{stroke-width:1;opacity:.38;stroke-linejoin:round}
.points{stroke-width:3.4;stroke-linecap:round}
.dots{stroke-width:6.5;stroke-linecap:round}
.ring{stroke-width:12;stroke-linecap:round}
.hole{stroke:var(--card);stroke-width:7;stroke-linecap:round}
.mark{stroke-width:1.3;stroke-dasharray:4 3;opacity:.75}
.mark.switch{stroke-dasharray:none;stroke-width:1.6}
.mark.resume{stroke-dasharray:1 3;stroke-width:1.8}
.mark.crowded{opacity:.2}
.level{stroke-width:1.3;stroke-dasharray:6 4}
.yt,.xt{position:absolute;font-size:.74rem;color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums;
line-height:1}
.yt{right:100%;transform:translateY(-50%);padding-right:.45rem}
.xt{top:100%;transform:translateX(-50%);padding-top:.4rem}
.xl{text-align:center;font-size:.78rem;color:var(--soft);margin:1.35rem .9rem 0 3.1rem}
.note{position:absolute;top:.1rem;font-size:.74rem;padding:0 .3rem;margin:0 .15rem;white-space:nowrap;
border-radius:3px;background:color-mix(in srgb,var(--card) 82%,transparent);pointer-events:none}
.note.left{transform:translateX(calc(-100% - .3rem))}
.name{position:absolute;font-size:.74rem;line-height:15px;white-space:nowrap;pointer-events:none}
.empty{position:absolute;inset:0;margin:0;display:grid;place-items:center;color:var(--soft);font-size:.85rem}
figcaption,.fine{font-size:.84rem;color:var(--soft);margin:.5rem 0 0}
.hair{position:absolute;top:0;bottom:0;width:1px;background:var(--ink);opacity:.5;pointer-events:none}
.tip{position:absolute;top:.4rem;z-index:2;background:var(--card);border:1px solid var(--soft);border-radius:6px;
padding:.3rem .55rem;font-size:.78rem;line-height:1.45;pointer-events:none;white-space:nowrap;
font-variant-numeric:tabular-nums;box-shadow:0 2px 8px #0003}
.tip i{display:inline-block;width:.55rem;height:.55rem;border-radius:50%;margin-right:.4rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;font-size:.95rem;padding-bottom:.4rem}
th,td{padding:.38rem .48rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:.8rem;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.left,th.left{text-align:left}
td small{color:var(--soft)}
.bars{margin-top:1.2rem}
.bar{display:grid;grid-template-columns:8.5rem 1fr 5.5rem;gap:.6rem;align-items:center;font-size:.85rem;margin:.35rem 0}
.bar b{font-weight:400;overflow-wrap:anywhere}
.bar div{display:flex;height:1.15rem;gap:1px}
.bar div i{display:block;height:100%}
.bar em{font-style:normal;text-align:right;font-variant-numeric:tabular-nums}
.swatch{width:.75rem!important;height:.75rem!important;border:0!important;border-radius:2px}
pre{margin:0;overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
background:var(--bg);border:1px solid var(--rule);border-radius:6px;padding:.8rem 1rem}
pre+p,p+pre{margin-top:.7rem}
details{margin-top:1.2rem}
summary{cursor:pointer;font-weight:600;font-size:.95rem}
footer{color:var(--soft);font-size:.82rem;margin-top:1.4rem}
@media (max-width:620px){main{padding:1.2rem .8rem 2rem}section{padding:1rem .9rem}h1{font-size:1.5rem}
.cards{grid-template-columns:repeat(2,1fr)}.card b{font-size:1.2rem}.box{margin:0 .4rem 0 2.7rem}
.xl{margin-left:2.7rem;margin-right:.4rem}.bar{grid-template-columns:1fr auto}.bar div{grid-column:1/3;grid-row:2}}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
""".strip()

#: A cross-hair under the pointer, moved by the arrow keys as well. It reads only attributes that plots.py wrote,
#: and puts text in as text.
SCRIPT = """
"use strict";
for (const box of document.querySelectorAll(".box[data-s]")) {
  const series = JSON.parse(box.dataset.s), [x0, x1] = box.dataset.x.split(",").map(Number);
  if (!series.length || !series.some(s => s.x.length)) continue;
  const longest = series.reduce((a, b) => b.x.length > a.x.length ? b : a);
  let hair, tip, at = -1;
  const text = v => Math.abs(v) >= 1e6 || (v !== 0 && Math.abs(v) < 1e-3)
    ? v.toExponential(3) : v.toLocaleString("en", {maximumSignificantDigits: 5});
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const hide = () => { if (hair) { hair.remove(); tip.remove(); hair = tip = null; } at = -1; };
  const show = x => {
    if (!hair) {
      hair = document.createElement("div"); hair.className = "hair";
      tip = document.createElement("div"); tip.className = "tip";
      box.append(hair, tip);
    }
    at = nearest(longest.x, x);
    const here = longest.x[at], share = (here - x0) / (x1 - x0);
    hair.style.left = 100 * share + "%";
    tip.replaceChildren();
    const row = (label, colour) => {
      const line = document.createElement("div");
      if (colour) {
        const dot = document.createElement("i");
        dot.style.background = `var(--${colour})`;
        line.append(dot);
      }
      line.append(label); tip.append(line);
    };
    row(`${box.dataset.word} ${here.toLocaleString("en", {maximumSignificantDigits: 6})}`);
    for (const s of series) {
      if (!s.x.length) continue;
      const i = nearest(s.x, here), away = Math.abs(s.x[i] - here) / (x1 - x0);
      const where = away > 0.004 ? ` (at ${s.x[i].toLocaleString("en")})` : "";
      if (away < 0.04) row(`${s.l}: ${text(s.y[i])}${where}`, s.c);
    }
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "";
    tip.style.right = share < 0.5 ? "" : `calc(${100 - 100 * share}% + 10px)`;
  };
  box.addEventListener("pointermove", e => {
    const r = box.getBoundingClientRect();
    show(x0 + (e.clientX - r.left) / r.width * (x1 - x0));
  });
  box.addEventListener("pointerleave", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("keydown", e => {
    if (e.key === "Escape") return hide();
    const by = {ArrowLeft: -1, ArrowRight: 1}[e.key];
    if (!by) return;
    e.preventDefault();
    const step = e.shiftKey ? Math.max(1, Math.round(longest.x.length / 20)) : 1;
    const next = at < 0 ? (by > 0 ? 0 : longest.x.length - 1) : at + by * step;
    show(longest.x[Math.min(Math.max(next, 0), longest.x.length - 1)]);
  });
}
""".strip()
