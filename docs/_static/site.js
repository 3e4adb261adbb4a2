// SPDX-License-Identifier: BSD-3-Clause
// What the theme leaves out for keyboards and screen readers: code and tables that scroll can be reached, captions have
// a level, what stands beside the text is in a landmark, an empty corner of a table is no heading, and each page has
// one.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".highlight pre").forEach((code) => code.setAttribute("tabindex", "0"));
  document.querySelectorAll("[role=heading]").forEach((caption) => caption.setAttribute("aria-level", "2"));
  document.querySelectorAll("aside.sidebar-drawer").forEach((aside) => aside.setAttribute("aria-label", "Pages"));
  document.querySelectorAll("aside.toc-drawer").forEach((aside) => aside.setAttribute("aria-label", "On this page"));
  document.querySelectorAll(".content-icon-container").forEach((icons) => {
    icons.setAttribute("role", "navigation");
    icons.setAttribute("aria-label", "Source of this page");
  });
  document.querySelectorAll(".table-wrapper").forEach((wrapper, number) => {
    wrapper.setAttribute("tabindex", "0");
    wrapper.setAttribute("role", "region");
    wrapper.setAttribute("aria-label", `Table ${number + 1}`);
  });
  document.querySelectorAll("th").forEach((heading) => {
    if (!heading.textContent.trim()) heading.replaceWith(document.createElement("td"));
  });
  if (!document.querySelector("h1")) {
    const heading = document.createElement("h1");
    heading.className = "visually-hidden";
    heading.textContent = document.title;
    document.querySelector("article")?.prepend(heading);
  }
});
