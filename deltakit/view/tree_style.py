"""The style and the script of trees in HTML.

Notebooks that are not trusted remove both. Then rows still open and close, columns and guide lines stand in `style`
attributes, and deltas are bold on a tint.

Colours follow the page, whatever theme the system has: they are mixed from the text's own colour, which is inherited. So the
contrast is that of the page's text, or nearly. `color-scheme` and `prefers-color-scheme` would follow the system, and a dark
page of nbconvert declares nothing.
"""

STYLE = """
.deltakit-tree .dk-row:hover{background-color:rgba(128,128,128,.16)}
.deltakit-tree summary{cursor:pointer}
.deltakit-tree .dk-type,.deltakit-tree .dk-detail,.deltakit-tree .dk-tie{color:color-mix(in srgb,currentColor 62%,#1f883d)}
.deltakit-tree .dk-trainable{color:color-mix(in srgb,currentColor 50%,#1f6feb)}
.deltakit-tree .dk-frozen,.deltakit-tree .dk-buffers,.deltakit-tree .dk-more{opacity:.75}
.deltakit-tree .dk-delta,.deltakit-tree .dk-shape{color:color-mix(in srgb,currentColor 50%,#8250df)}
.deltakit-tree code{font:inherit;color:inherit;background:none;padding:0;user-select:all}
.deltakit-tree .dk-bar{display:flex;gap:.6em;margin-bottom:.3em;align-items:center}
.deltakit-tree .dk-bar>*{font:inherit;color:inherit;background:transparent;border:1px solid #888;border-radius:.3em}
.deltakit-tree .dk-bar>*{padding:0 .5em}
.deltakit-tree .dk-bar>output{border:0}
.deltakit-tree .dk-bar ::placeholder{color:inherit;opacity:.75}
.deltakit-tree.dk-live [data-selector]{cursor:copy}
.deltakit-tree.dk-live .dk-selectors{display:none}
.deltakit-tree .dk-away{display:none}
"""

SCRIPT = """
(function () {
  const tree = document.currentScript && document.currentScript.closest(".deltakit-tree");
  if (!tree || tree.classList.contains("dk-live")) return;
  tree.classList.add("dk-live");
  const bar = document.createElement("div");
  bar.className = "dk-bar";
  const add = (kind, text, act) => {
    const made = bar.appendChild(document.createElement(kind));
    made.textContent = text;
    if (act) made.addEventListener("click", act);
    return made;
  };
  const all = () => [...tree.querySelectorAll(".dk-tree details")];
  const first = all().map((part) => part.open);
  add("button", "expand all", () => all().forEach((part) => { part.open = true; }));
  add("button", "collapse", () => all().forEach((part, n) => { part.open = n === 0; }));
  const search = add("input", "");
  search.type = "search";
  search.placeholder = "search";
  search.setAttribute("aria-label", "search the tree");
  const said = add("output", "");
  tree.prepend(bar);

  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    const matches = (row) => row.textContent.toLowerCase().includes(wanted);
    let found = 0;
    // Returns whether anything in an item matches; `shown` if something around it does.
    const look = (item, shown) => {
      const row = item.querySelector(".dk-row");
      const own = matches(row);
      found += own;
      const below = [...item.querySelectorAll(":scope > details > .dk-in > .dk-item")];
      const inside = below.map((part) => look(part, shown || own)).includes(true);
      item.classList.toggle("dk-away", Boolean(wanted) && !own && !inside && !shown);
      if (wanted && inside) item.querySelector("details").open = true;
      return own || inside;
    };
    tree.querySelectorAll(".dk-tree > .dk-item").forEach((item) => look(item, false));
    if (!wanted) all().forEach((part, n) => { part.open = first[n]; });
    said.textContent = wanted ? found + (found === 1 ? " row" : " rows") : "";
  });

  const copied = (text) => { said.textContent = "copied: " + text; };
  const copy = (text) => {
    if (navigator.clipboard && window.isSecureContext) {
      navigator.clipboard.writeText(text).then(() => copied(text), () => byHand(text));
    } else {
      byHand(text);
    }
  };
  const byHand = (text) => {
    const field = bar.appendChild(document.createElement("textarea"));
    field.value = text;
    field.select();
    said.textContent = "not copied: " + text;
    if (document.execCommand("copy")) copied(text);
    field.remove();
  };
  tree.querySelectorAll(".dk-label").forEach((label) => { label.title = label.textContent; });
  tree.querySelectorAll("[data-selector]").forEach((name) => { name.title = "copy " + name.dataset.selector; });
  tree.addEventListener("click", (event) => {
    const name = event.target.closest("[data-selector]");
    const row = event.target.closest(".dk-row");
    const leaf = row && row.tagName !== "SUMMARY" ? row.querySelector("[data-selector]") : null;
    if (!name && !leaf) return;
    event.preventDefault();
    copy((name || leaf).dataset.selector);
  });
})();
"""
