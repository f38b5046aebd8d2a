"""The style and the script that show a picker, on a page of the browser and in a notebook.

`deltakitPicker(box, tree, send)` fills an element, and returns the function that shows a state. What the user does is sent as
a message, which `picker.act` reads. Names of modules are only ever set as text, so no name can be HTML.
"""

STYLE = """
.dk-pick { font: 14px/1.5 system-ui, sans-serif; max-width: 100%; }
.dk-pick ul { list-style: none; margin: 0; padding: 0; }
.dk-pick ul ul { margin-left: .6em; padding-left: 1.1em; border-left: 1px solid #888; }
.dk-pick li::marker { content: none; }
.dk-pick .dk-line { display: flex; align-items: baseline; gap: .4em; border-radius: .25em; }
.dk-pick .dk-line:hover, .dk-pick .dk-line:focus-within { background: rgba(128, 128, 128, .16); }
.dk-pick .dk-ticked { background: rgba(130, 80, 223, .16); font-weight: bold; }
.dk-pick label { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; white-space: pre; }
.dk-pick button, .dk-pick input[type=search] { font: inherit; color: inherit; background: transparent; }
.dk-pick button, .dk-pick input[type=search] { border: 1px solid #888; border-radius: .3em; padding: 0 .5em; }
.dk-pick button { cursor: pointer; }
.dk-pick .dk-fold { border: 0; padding: 0; width: 1.2em; flex: none; }
.dk-pick .dk-every { font-size: 12px; font-weight: normal; line-height: 1.3; opacity: 0; }
.dk-pick .dk-line:hover .dk-every, .dk-pick .dk-line:focus-within .dk-every { opacity: 1; }
@media (hover: none) { .dk-pick .dk-every { opacity: 1; } }
.dk-pick ::placeholder { color: inherit; opacity: .75; }
.dk-pick .dk-code { min-height: 1.6em; padding-bottom: .4em; }
.dk-pick .dk-bar { display: flex; flex-wrap: wrap; gap: .6em; align-items: center; padding: .5em 0; }
.dk-pick code { font-family: ui-monospace, Menlo, Consolas, monospace; user-select: all; overflow-wrap: anywhere; }
.dk-pick [hidden] { display: none; }
.dk-pick :focus-visible { outline: 2px solid #8250df; outline-offset: 1px; }
"""

SCRIPT = """
let dkPickers = 0;
function deltakitPicker(box, tree, send) {
  const own = "dk" + dkPickers++;
  const make = (parent, kind, name, text) => {
    const made = parent.appendChild(document.createElement(kind));
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const button = (parent, name, text, act) => {
    const made = make(parent, "button", name, text);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  };
  box.classList.add("dk-pick");
  const head = make(box, "div", "dk-head"), bar = make(head, "div", "dk-bar");
  const search = make(bar, "input");
  search.type = "search";
  search.size = 36;
  search.placeholder = "filter: a part of a name, or @attn.q";
  search.setAttribute("aria-label", "filter the modules, by a part of a name or by a selector");
  search.addEventListener("input", () => send({ do: "filter", text: search.value }));
  const matches = button(bar, "", "", () => send({ do: "matches", on: true }));
  button(bar, "", "clear ticks", () => send({ do: "clear" }));
  const result = make(head, "div");
  result.setAttribute("role", "status");
  const summary = make(result, "div"), code = make(make(result, "div", "dk-code"), "code", "dk-result");
  const items = [], boxes = [], lines = [], some = [];
  const top = make(box, "ul");
  top.setAttribute("aria-label", "modules of " + tree.title);
  tree.rows.forEach((row, number) => {
    let list = top;
    if (row.parent >= 0) {
      const around = items[row.parent];
      list = around.querySelector(":scope > ul") || make(around, "ul");
      const fold = around.querySelector(":scope > .dk-line > .dk-fold");
      if (!fold.textContent) {
        const inside = list;
        fold.textContent = "\\u25be";
        fold.disabled = false;
        fold.setAttribute("aria-expanded", "true");
        fold.setAttribute("aria-label", "what is in " + tree.rows[row.parent].path);
        fold.addEventListener("click", () => {
          inside.hidden = !inside.hidden;
          fold.textContent = inside.hidden ? "\\u25b8" : "\\u25be";
          fold.setAttribute("aria-expanded", String(!inside.hidden));
        });
      }
    }
    const item = items[number] = make(list, "li");
    const line = lines[number] = make(item, "div", "dk-line");
    const fold = make(line, "button", "dk-fold");
    fold.type = "button";
    fold.disabled = true;
    if (row.modules) {
      const tick = boxes[number] = make(line, "input");
      tick.type = "checkbox";
      tick.id = own + "-" + number;
      tick.title = row.path;
      tick.addEventListener("change", () => send({ do: "tick", row: number, on: tick.checked }));
    }
    const label = make(line, "label", "", row.label);
    if (!row.modules) return;
    label.htmlFor = own + "-" + number;
    label.title = row.path;
    some[number] = make(line, "span");
    const everywhere = button(line, "dk-every", "everywhere", () => {
      send({ do: "everywhere", row: number, on: !boxes[number].checked });
    });
    everywhere.title = "all modules named " + row.name;
    everywhere.setAttribute("aria-label", "tick or untick all modules named " + row.name);
  });
  return (state) => {
    const shown = new Set(state.shown);
    items.forEach((item, number) => {
      item.hidden = !shown.has(number);
      if (!boxes[number]) return;
      const count = state.ticked[number] || 0, all = tree.rows[number].modules;
      boxes[number].checked = count === all;
      boxes[number].indeterminate = count > 0 && count < all;
      some[number].textContent = count > 0 && count < all ? count + " of " + all : "";
      lines[number].classList.toggle("dk-ticked", count > 0);
    });
    if (document.activeElement !== search) search.value = state.filter;
    const found = state.matches + (state.matches === 1 ? " matching module" : " matching modules");
    matches.textContent = state.matches ? "tick " + found : "nothing matches";
    matches.disabled = !state.matches;
    matches.hidden = !state.filter.trim();
    summary.textContent = state.summary;
    code.textContent = state.line;
  };
}
"""

PAGE_SCRIPT = """
const start = JSON.parse(document.getElementById("start").textContent);
const token = new URLSearchParams(location.search).get("token");
const said = document.getElementById("said"), buttons = [...document.querySelectorAll("footer button")];
let sent = 0, over = false, before = Promise.resolve();
function send(message) {
  const mine = ++sent;
  // One after the other: two requests at once may arrive in another order.
  return before = before.then(() => post(message, mine));
}
async function post(message, mine) {
  try {
    const answer = await fetch("/act", {
      method: "POST", body: JSON.stringify(message),
      headers: { "Content-Type": "application/json", "X-Deltakit-Token": token },
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    // Only the latest answer is of now.
    if (mine === sent) show(found);
    return true;
  } catch (error) {
    if (!over) said.textContent = "The program that asked does not answer any more (" + error.message + ").";
    return false;
  }
}
async function end(message, words) {
  over = true;
  over = await send(message);
  if (!over) return;
  buttons.forEach((button) => { button.disabled = true; });
  document.getElementById("tree").inert = true;
  said.textContent = words();
}
const show = deltakitPicker(document.getElementById("tree"), start.tree, send);
const line = () => document.querySelector(".dk-result").textContent;
show(start.state);
buttons[0].addEventListener("click", () => {
  end({ do: "submit" }, () => (line() ? "Done. " : "Nothing is picked. ") + "You can close this page.");
});
buttons[1].addEventListener("click", () => end({ do: "cancel" }, () => "Cancelled. You can close this page."));
// As long as this request is open, the program knows that the page is.
async function stayOpen() {
  for (let tries = 0; tries < 4; tries++) {
    try {
      const answer = await fetch("/open", { headers: { "X-Deltakit-Token": token } });
      await answer.text();
      break;
    } catch (error) {
      await new Promise((next) => setTimeout(next, 400));
    }
  }
  if (!over) said.textContent = "The program that asked has ended.";
}
stayOpen();
"""
