"""Pages that stand alone: one style, templates that escape, charts as inline SVG. No torch."""
