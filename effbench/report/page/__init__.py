"""Records as one HTML file that needs no network: `render.page`.

Table and charts are a few hundred lines of JavaScript and SVG of our own, not a grid and a plotting
library: less to send around in every file, and they do what those do not -
columns that are the same in all shown rows hidden as one filters, fronts, intervals, one set of
shown rows for the table and for every chart - without a style attribute or an `eval` that a
Content-Security-Policy would have to let through.
"""
