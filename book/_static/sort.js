// Tables inside .sortable sort by the column whose heading is pressed; by number where cells begin with one.

function sortKey(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/^[±+]/, "").replaceAll(",", ""));
  return { text, number, unknown: text === "" || text === "–" };
}

function compareKeys(a, b) {
  if (!Number.isNaN(a.number) && !Number.isNaN(b.number) && a.number !== b.number) return a.number - b.number;
  return a.text.localeCompare(b.text, "en", { numeric: true });
}

function sortBy(table, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [sortKey(row, column), row]);
  keyed.sort(([a], [b]) => {
    if (a.unknown || b.unknown) return Number(a.unknown) - Number(b.unknown); // last, whichever way
    return up ? compareKeys(a, b) : compareKeys(b, a);
  });
  body.append(...keyed.map(([, row]) => row));
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".sortable table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => sortBy(table, head, column));
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
    });
  }
});
