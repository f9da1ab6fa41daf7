"use strict";
(function () {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  const viewer = document.getElementById("viewer");
  if (viewer) {
    const left = viewer.querySelector("img.left"), right = viewer.querySelector("img.right");
    const edge = viewer.querySelector(".edge"), range = viewer.querySelector("input[type=range]");
    const name = viewer.querySelector(".name");
    const shown = { index: 0, left: "image", right: "prediction" };
    const press = (buttons, test) => buttons.forEach(b => b.setAttribute("aria-pressed", String(test(b))));
    const sides = [...viewer.querySelectorAll("button[data-side]")];
    const thumbs = [...viewer.querySelectorAll("button[data-index]")];
    const draw = () => {
      const picture = pictures[shown.index];
      left.src = picture[shown.left];
      right.src = picture[shown.right];
      left.alt = shown.left + " of " + picture.name;
      right.alt = shown.right + " of " + picture.name;
      right.style.clipPath = "inset(0 0 0 " + range.value + "%)";
      edge.style.left = range.value + "%";
      name.textContent = picture.name + " (" + (shown.index + 1) + " of " + pictures.length + ")";
      range.setAttribute("aria-valuetext", shown.left + " on " + range.value + " percent, then " + shown.right);
      press(sides, b => shown[b.dataset.side] === b.dataset.layer);
      press(thumbs, b => Number(b.dataset.index) === shown.index);
    };
    thumbs.forEach(b => {
      b.querySelector("img").src = pictures[Number(b.dataset.index)].image;
      b.addEventListener("click", () => { shown.index = Number(b.dataset.index); draw(); });
    });
    sides.forEach(b => b.addEventListener("click", () => { shown[b.dataset.side] = b.dataset.layer; draw(); }));
    range.addEventListener("input", draw);
    draw();
  }
  const count = document.getElementById("cycle-count");
  if (count) {
    const open = document.getElementById("cycle-open"), shown = document.getElementById("cycle-shown");
    const all = [...document.querySelectorAll(".cycle")];
    const draw = () => {
      const more = open.getAttribute("aria-pressed") === "true";
      all.forEach(g => g.toggleAttribute("hidden", Number(g.dataset.n) >= Number(count.value) || (g.classList.contains("open") && !more)));
      shown.textContent = count.value;
    };
    count.addEventListener("input", draw);
    open.addEventListener("click", () => {
      open.setAttribute("aria-pressed", String(open.getAttribute("aria-pressed") !== "true"));
      draw();
    });
    draw();
  }
})();
