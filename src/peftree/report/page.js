"use strict";
// Sorting and filtering of the tables. Without it the page is complete, in the order of the report.
const chosen = { branch: "", modality: "", budget: "" }; // of the whole page
const refreshers = [];

const sortable = (table) => {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const key = (row, column) => {
    const cell = row.cells[column];
    if (heads[column].classList.contains("l")) return cell.textContent.trim().toLowerCase();
    const shown = cell.dataset.key || (cell.firstChild ? cell.firstChild.textContent.replace("\u2212", "-") : "");
    const number = shown.trim() === "" ? NaN : Number(shown);
    return Number.isNaN(number) ? null : number;
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
};

// Rows of the further tables have the branch and budget that their method has in the section's results.
const known = new Map();
const named = (row) => (row.closest("section") || row).id + " " + row.cells[0].firstChild.textContent;
for (const row of document.querySelectorAll("tr[data-of]")) known.set(named(row), row.dataset.of);
const tags = (part) => (part.dataset.of || (part.cells && known.get(named(part))) || "").split(" ");
const branchOf = (part) => tags(part)[0];
const everywhere = (row) => {
  const [branch, budget] = tags(row);
  return (!chosen.branch || !branch || branch === chosen.branch) && (!chosen.budget || !branch || budget === chosen.budget);
};

for (const table of document.querySelectorAll("table.sorts")) {
  if (table.rows.length > 2) sortable(table);
  const rows = Array.from(table.tBodies[0].rows);
  const bar = table.classList.contains("results") ? table.closest("section").querySelector(".filter") : null;
  const words = bar && bar.querySelector("input");
  const branch = bar && bar.querySelector("select");
  const refresh = () => {
    const wanted = words ? words.value.trim().toLowerCase().split(/\s+/) : [];
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = everywhere(row) && wanted.every((word) => text.includes(word)) &&
        (!branch || !branch.value || branchOf(row) === branch.value);
      row.hidden = !fits;
      shown += fits;
    }
    for (const row of table.rows) {
      Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
        if (head.dataset.modality) row.cells[column].hidden = chosen.modality !== "" && head.dataset.modality !== chosen.modality;
      });
    }
    if (bar) bar.querySelector("output").textContent = shown === rows.length ? "" : shown + " of " + rows.length + " methods shown";
  };
  refreshers.push(refresh);
  if (bar) {
    words.addEventListener("input", refresh);
    branch.addEventListener("change", refresh);
    bar.hidden = false;
  }
}

const form = document.querySelector("form.everywhere");
if (form) {
  const apply = () => {
    for (const select of form.querySelectorAll("select")) chosen[select.dataset.by] = select.value;
    let shown = 0, all = 0;
    for (const part of document.querySelectorAll("section.task, nav li")) {
      if (!part.dataset.modality) continue;
      part.hidden = chosen.modality !== "" && part.dataset.modality !== chosen.modality;
      if (part.tagName === "SECTION") { all += 1; shown += !part.hidden; }
    }
    for (const part of document.querySelectorAll("details[data-of]")) part.hidden = chosen.branch !== "" && branchOf(part) !== chosen.branch;
    for (const refresh of refreshers) refresh();
    form.querySelector("output").textContent = shown === all ? "" : shown + " of " + all + " tasks shown";
  };
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = false;
}

// A link to a folded part opens it.
const unfold = () => {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.querySelector("summary").focus();
  }
};
addEventListener("hashchange", unfold);
unfold();
