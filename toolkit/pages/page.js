"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  document.querySelectorAll("[data-figure]").forEach((target) => plots.draw(target, figures[Number(target.dataset.figure)]));
  document.documentElement.dataset.ready = "yes";
})();
