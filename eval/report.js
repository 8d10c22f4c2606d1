"use strict";
// Adds a button to each column that sorts the rows of its table: numbers by value, text by letters, empty cells last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const text = (cell) => cell.dataset.value ?? cell.textContent;
  const number = (cell) => ("value" in cell.dataset ? Number(cell.dataset.value.replace("inf", "Infinity")) : NaN);
  const isEmpty = (cell) => !("value" in cell.dataset) && ["-", "nan", "unknown"].includes(cell.textContent);
  const compare = (one, other) => {
    const difference = number(one) - number(other);
    return Number.isNaN(difference) ? text(one).localeCompare(text(other), "en", { numeric: true }) : difference;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "\u2195";
    button.setAttribute("aria-label", `Sort by ${head.textContent}`);
    head.append(" ", button);
    button.addEventListener("click", () => {
      const isUp = head.getAttribute("aria-sort") !== "ascending";
      for (const each of heads) {
        each.removeAttribute("aria-sort");
        each.querySelector("button").textContent = "\u2195";
      }
      head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
      button.textContent = isUp ? "\u2191" : "\u2193";
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [one, other] = [a.cells[column], b.cells[column]];
        if (isEmpty(one) || isEmpty(other)) return isEmpty(one) - isEmpty(other);
        return (isUp ? 1 : -1) * compare(one, other);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
