"""Runs read, gathered, tabulated and drawn, and the questions that they answer."""
