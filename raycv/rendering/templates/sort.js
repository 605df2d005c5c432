"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const value = (row, at) => row.cells[at].dataset.value ?? null;
  [...table.tHead.rows[0].cells].forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = "Sort by this column";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = (one, two) => {
        const [a, b] = [value(one, at), value(two, at)];
        if (a !== null && b !== null) return up ? a - b : b - a;
        // Undefined values stay last in both directions.
        if (a !== null || b !== null) return a === null ? 1 : -1;
        const names = [one, two].map((row) => row.cells[at].textContent);
        return (up ? 1 : -1) * names[0].localeCompare(names[1], "en", { numeric: true });
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
