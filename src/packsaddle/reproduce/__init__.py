"""The paper's figures and table from real data, and studies beside them: configurations, runs, summaries, figures."""
