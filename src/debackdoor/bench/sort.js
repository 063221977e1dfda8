for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // Names begin with a, numbers with the largest; a second click turns that round.
      const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows];
      const missing = row => ["", "-"].includes(value(row));
      const numeric = rows.every(row => missing(row) || !isNaN(value(row)));
      const before = head.getAttribute("aria-sort");
      const up = before === null ? !numeric : before === "descending";
      const compare = (a, b) => (numeric ? value(a) - value(b) : value(a).localeCompare(value(b))) * (up ? 1 : -1);
      // What was not measured comes last either way.
      rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : compare(a, b)));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}
