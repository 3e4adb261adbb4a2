// SPDX-License-Identifier: BSD-3-Clause
// What the theme leaves out for keyboards and screen readers: code that scrolls can be reached, captions have a level.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".highlight pre").forEach((code) => code.setAttribute("tabindex", "0"));
  document.querySelectorAll("[role=heading]").forEach((caption) => caption.setAttribute("aria-level", "2"));
  document.querySelectorAll("aside.sidebar-drawer").forEach((aside) => aside.setAttribute("aria-label", "Pages"));
  document.querySelectorAll("aside.toc-drawer").forEach((aside) => aside.setAttribute("aria-label", "On this page"));
});
