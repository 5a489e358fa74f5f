"use strict";
// Sorting and filtering of the result tables. Without it the page is complete, in score order.
for (const section of document.querySelectorAll("section.task")) {
  const table = section.querySelector("table.results");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);

  const key = (row, column) => {
    const cell = row.cells[column];
    if (!heads[column].classList.contains("n")) return cell.textContent.trim().toLowerCase();
    return cell.dataset.key === undefined ? null : Number(cell.dataset.key);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en"));

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = rows.slice().sort((left, right) => {
        const a = key(left, column), b = key(right, column);
        if (a === null || b === null) return (a === null) - (b === null); // gaps stay last
        return down ? compare(b, a) : compare(a, b);
      });
      body.append(...sorted);
    });
  });

  const bar = section.querySelector(".filter");
  const words = bar.querySelector("input");
  const branch = bar.querySelector("select");
  const said = bar.querySelector("output");
  const filter = () => {
    const wanted = words.value.trim().toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = wanted.every((word) => text.includes(word)) &&
        (!branch.value || row.dataset.branch === branch.value);
      row.hidden = !fits;
      shown += fits;
    }
    said.textContent = shown === rows.length ? "" : shown + " of " + rows.length + " methods shown";
  };
  words.addEventListener("input", filter);
  branch.addEventListener("change", filter);
  bar.hidden = false;
}
