// Formulas that Arithmatex marked, drawn by KaTeX; again after every instant page change of the theme.
document$.subscribe(({ body }) => {
  for (const element of body.querySelectorAll(".arithmatex")) {
    const display = element.tagName === "DIV"
    const source = element.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "")
    katex.render(source, element, { displayMode: display, throwOnError: false })
  }
})
