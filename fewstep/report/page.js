// The slider shows one grid of the training at a time.
for (const film of document.querySelectorAll(".film")) {
  const names = JSON.parse(film.dataset.names), frames = film.querySelectorAll("img");
  film.querySelector("input")?.addEventListener("input", (event) => {
    const at = Number(event.target.value);
    frames.forEach((frame, i) => { frame.hidden = i !== at; });
    film.querySelector("output").textContent = names[at];
    event.target.setAttribute("aria-valuetext", names[at]);
  });
}

// A touched picture, or group of pictures, is shown large; arrows go on to its neighbours.
const dialog = document.querySelector("dialog");
const stage = dialog.querySelector(".stage"), said = dialog.querySelector("p");
let group = [], at = 0;

function show(place) {
  at = (place + group.length) % group.length;
  const button = group[at], shown = [...button.querySelectorAll("img")].filter((img) => !img.hidden);
  stage.replaceChildren(...shown.map((img) => {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const large = img.cloneNode();
    caption.textContent = img.alt;
    if (shown.length === 1) large.style.width = `${img.naturalWidth * 2}px`;
    figure.append(large, caption);
    return figure;
  }));
  stage.classList.toggle("alone", shown.length === 1);
  said.textContent = button.querySelector(".strip + span")?.textContent ?? "";
  dialog.querySelectorAll("[data-move]").forEach((move) => { move.hidden = move.dataset.move !== "0" && group.length < 2; });
}

for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    group = [...(button.closest("[data-gallery]")?.querySelectorAll(".enlarge") ?? [button])];
    show(group.indexOf(button));
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => {
  const move = event.target.dataset.move;
  if (event.target === dialog || move === "0") dialog.close();
  else if (move) show(at + Number(move));
});
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && group.length > 1) show(at + step);
});
