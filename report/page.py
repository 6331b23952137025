"""Pure: the look of the pages, and the few lines that draw the plots in the reader's light or dark colours."""

STYLE = """
:root { --ground: #ffffff; --panel: #f5f6f8; --text: #1c2228; --quiet: #5c6670; --line: #dfe3e8; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --panel: #1d2126; --text: #e4e7ea; --quiet: #9aa4ae; --line: #333a42; --accent: #7ab3e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
header { border-bottom: 1px solid var(--line); padding-bottom: 16px; margin-bottom: 16px; }
h1 { font-size: 26px; line-height: 1.25; margin: 4px 0 8px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: 14px; margin: 12px 0 0; font-weight: 600; color: var(--quiet); }
section { margin-top: 40px; }
.brand { margin: 0; color: var(--accent); font-weight: 600; letter-spacing: .02em; }
.notice { font-style: italic; }
.about { margin: 0; color: var(--quiet); max-width: 80ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.card p { margin: 0; }
.card .name { color: var(--quiet); font-size: 13px; font-weight: 600; }
.card .value { font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .behind { color: var(--quiet); font-size: 13px; line-height: 1.4; }
.plots { display: grid; grid-template-columns: minmax(0, 1fr); gap: 8px 24px; }
@media (min-width: 900px) { .plots.n2, .plots.n4 { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; min-width: 0; }
.empty { color: var(--quiet); background: var(--panel); border: 1px dashed var(--line); border-radius: 8px;
  padding: 24px; margin: 8px 0 0; text-align: center; }
.wide { overflow-x: auto; }
table.figures { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 8px; }
table.figures th { text-align: left; font-weight: 400; padding: 3px 24px 3px 0; color: var(--text); }
table.figures td, table.figures thead th { text-align: right; padding: 3px 12px; }
table.figures thead th { color: var(--quiet); font-weight: 600; max-width: 200px; vertical-align: bottom; }
table.figures th.group { font-weight: 650; padding-top: 14px; }
table.figures tbody tr { border-bottom: 1px solid var(--line); }
table.figures td.text { text-align: left; overflow-wrap: anywhere; }
table.figures tbody th { white-space: nowrap; }
.wide th:first-child { position: sticky; left: 0; background: var(--ground); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 0 32px; align-items: start; }
.grid table { width: 100%; }
.settings { margin: 2px 0; display: flex; flex-wrap: wrap; gap: 0 18px; overflow-wrap: anywhere; }
.settings b { color: var(--quiet); font-weight: 400; }
header ~ h3 { margin-top: 16px; }
pre + .cards, .settings + .cards { margin-top: 24px; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; margin: 8px 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
@media print { section { break-inside: avoid; } }
"""

SCRIPT = """
(() => {
  const plots = JSON.parse(document.getElementById('plots').textContent);
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = layout => {
    const axis = { gridcolor: colour('--line'), linecolor: colour('--line'), tickcolor: colour('--line') };
    return { ...layout, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour('--text') },
      hoverlabel: { bgcolor: colour('--panel'), bordercolor: colour('--line'), font: { color: colour('--text') } },
      xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis } };
  };
  const draw = () => plots.forEach((plot, i) =>
    Plotly.react('plot' + i, plot.data, themed(plot.layout), { responsive: true, displayModeBar: false }));
  draw();
  dark.addEventListener('change', draw);
})();
"""
