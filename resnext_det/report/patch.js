"use strict";
for (const form of document.querySelectorAll("form[data-patch]")) {
  const yes = () => [...form.querySelectorAll("input[data-edit]:checked")];
  const button = form.querySelector("button");
  button.disabled = true; // a reloaded page may remember answers
  form.addEventListener("change", () => {
    const [answered, all] = [":checked", ""].map((state) => form.querySelectorAll(`input${state}`).length);
    form.querySelector("output").textContent = `${answered} of ${all / 2} answered, ${yes().length} labels to change`;
    button.disabled = yes().length === 0;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const edits = yes().map((each) => JSON.parse(each.dataset.edit));
    const patch = JSON.stringify({ ...JSON.parse(form.dataset.patch), edits }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([patch + "\n"], { type: "application/json" }));
    link.download = form.dataset.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}
