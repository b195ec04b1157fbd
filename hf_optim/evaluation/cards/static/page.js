// Filters, sorting, plots and the theme of the page of results. Reads the page's own elements; writes text only.
"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const one = (selector, root = document) => root.querySelector(selector);
  const table = one("#table");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const shown = one("#shown");
  const controls = one("#controls");
  const points = all(".point");
  const rowOf = new Map(rows.map((row) => [row.dataset.card, row]));

  // -- filters ---------------------------------------------------------------------------------------------------
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  function filter() {
    const families = all('[name="family"]:checked', controls).map((box) => box.value);
    const base = controls.elements.base.value;
    const words = controls.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const own = row.dataset.families.split(" ");
      const text = texts.get(row);
      row.hidden = !(
        (!families.length || families.some((family) => own.includes(family))) &&
        (base === "" || row.dataset.base === base) &&
        words.every((word) => text.includes(word))
      );
      count += row.hidden ? 0 : 1;
    }
    for (const mark of all(".point[data-card], .labels [data-label]")) {
      mark.classList.toggle("off", rowOf.get(mark.dataset.card || mark.dataset.label).hidden);
    }
    if (count < rows.length) {
      for (const point of points) if (!point.classList.contains("off")) point.parentNode.append(point); // on top
    }
    for (const card of all("details[data-card]")) card.hidden = rowOf.get(card.dataset.card).hidden;
    for (const figure of all(".plot")) {
      const own = all(".point[data-card]", figure);
      figure.hidden = own.length > 0 && own.every((point) => point.classList.contains("off"));
      setStop(figure);
    }
    hideTip();
    tell(count);
  }

  let order = "";
  function tell(count = rows.filter((row) => !row.hidden).length) {
    shown.textContent = (count ? `${count} of ${rows.length} cards` : "No card matches: clear a filter") + order;
  }

  controls.hidden = false;
  controls.addEventListener("input", filter);
  controls.addEventListener("submit", (event) => event.preventDefault());
  // The fields have their first values only after the event.
  controls.addEventListener("reset", () => setTimeout(filter));

  // -- sorting ---------------------------------------------------------------------------------------------------
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const heads = all("thead [data-sort]", table);

  // The first head row has the columns without a group at both ends; the second has the others.
  const columns = [];
  for (const cell of table.tHead.rows[0].cells) {
    if (cell.dataset.sort) columns.push(cell);
    else for (let i = 0; i < cell.colSpan; i++) columns.push(null);
  }
  const below = Array.from(table.tHead.rows[1].cells);
  const indexOf = new Map();
  columns.forEach((cell, index) => indexOf.set(cell || below.shift(), index));

  function sort(head) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const index = indexOf.get(head);
    const numeric = head.dataset.sort === "number";
    const keys = new Map(
      rows.map((row) => {
        const cell = row.cells[index];
        if (!numeric) return [row, cell.classList.contains("missing") ? null : cell.textContent];
        return [row, cell.dataset.v === "" ? null : Number(cell.dataset.v)];
      }),
    );
    const compare = (a, b) => (numeric ? a - b : collator.compare(a, b));
    rows.sort((one, two) => {
      const [a, b] = [keys.get(one), keys.get(two)];
      if (a === null || b === null) return (a === null) - (b === null) || one.dataset.card - two.dataset.card;
      return (up ? compare(a, b) : compare(b, a)) || one.dataset.card - two.dataset.card;
    });
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
    const name = head.getAttribute("aria-label") || head.textContent;
    order = `, sorted by ${name}, ${up ? "ascending" : "descending"}`;
    tell();
  }

  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    if (head.hasAttribute("aria-label")) button.setAttribute("aria-label", head.getAttribute("aria-label"));
    head.append(button);
    button.addEventListener("click", () => sort(head));
  }
  heads[0].setAttribute("aria-sort", "ascending");

  // -- plots -----------------------------------------------------------------------------------------------------
  const tip = one("#tip");
  const linesOf = new Map();
  let current = null;

  for (const point of points) {
    const title = one("title", point);
    linesOf.set(point, title.textContent.split(" | "));
    point.setAttribute("aria-label", linesOf.get(point).join(", "));
    title.remove(); // or the browser shows it beside the tip
    point.addEventListener("pointerenter", () => showTip(point));
    point.addEventListener("pointerleave", hideTip);
    point.addEventListener("focus", () => showTip(point));
    point.addEventListener("blur", hideTip);
  }

  function centre(point) {
    const box = one("path", point).getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  }

  function showTip(point) {
    hideTip();
    current = point;
    const [name, ...rest] = linesOf.get(point);
    const title = document.createElement("b");
    title.textContent = name;
    const parts = rest.map((line) => Object.assign(document.createElement("div"), { textContent: line }));
    const [x, y] = centre(point);
    const near = all(".point:not(.off)", point.ownerSVGElement).filter((other) => {
      const [a, b] = centre(other);
      return other !== point && Math.hypot(a - x, b - y) < 7;
    });
    if (near.length) {
      const names = near.slice(0, 6).map((other) => linesOf.get(other)[0]);
      if (near.length > 6) names.push(`${near.length - 6} more`);
      const same = document.createElement("div");
      same.className = "same";
      same.textContent = `At the same place: ${names.join("; ")}`;
      parts.push(same);
    }
    tip.replaceChildren(title, ...parts);
    tip.hidden = false;
    const left = Math.min(x + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const top = y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 14 : y + 14;
    tip.style.left = `${Math.max(8, left) + scrollX}px`;
    tip.style.top = `${Math.max(8, top) + scrollY}px`;
    light(point.dataset.card, true);
  }

  function hideTip() {
    tip.hidden = true;
    if (current) light(current.dataset.card, false);
    current = null;
  }

  function light(card, on) {
    if (!card) return;
    rowOf.get(card).classList.toggle("lit", on);
    for (const point of all(`.point[data-card="${card}"]`)) point.classList.toggle("lit", on);
  }

  for (const row of rows) {
    row.addEventListener("pointerenter", () => light(row.dataset.card, true));
    row.addEventListener("pointerleave", () => light(row.dataset.card, false));
  }

  // A plot is one stop of the Tab key; arrow keys move among its points, from left to right and from top to bottom.
  function usable(figure) {
    return all(".point:not(.off)", figure).sort((a, b) => {
      const [x, y] = centre(a);
      const [u, v] = centre(b);
      return x - u || y - v;
    });
  }

  function setStop(figure, chosen) {
    const stop = chosen || one(".point:not(.off)[data-card]", figure);
    for (const point of all(".point", figure)) point.setAttribute("tabindex", point === stop ? "0" : "-1");
  }

  for (const figure of all(".plot")) {
    setStop(figure);
    one("svg", figure).setAttribute("aria-description", "Arrow keys move among the points, Enter opens a card.");
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const point = event.target.closest(".point");
      if (!point || (!step && event.key !== "Home" && event.key !== "End")) return;
      event.preventDefault();
      const list = usable(figure);
      const at = event.key === "Home" ? 0 : event.key === "End" ? list.length - 1 : list.indexOf(point) + step;
      const next = list[Math.min(Math.max(at, 0), list.length - 1)];
      setStop(figure, next);
      next.focus();
    });
  }

  // -- cards -----------------------------------------------------------------------------------------------------
  function openCard() {
    const card = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!card || card.tagName !== "DETAILS") return;
    card.open = true;
    one("summary", card).focus({ preventScroll: true });
    card.scrollIntoView();
  }
  addEventListener("hashchange", openCard);
  // The address does not change when the same card is opened again.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#card-']");
    if (link && link.getAttribute("href") === location.hash) openCard();
  });
  openCard();

  // -- theme -----------------------------------------------------------------------------------------------------
  const theme = one("#theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const name = () => (theme.textContent = isDark() ? "Light theme" : "Dark theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  dark.addEventListener("change", name);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
  });

  name();
  tell();
})();
