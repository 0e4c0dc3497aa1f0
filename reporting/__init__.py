"""Read, group, tabulate and draw runs for the report, and answer three questions from them."""
