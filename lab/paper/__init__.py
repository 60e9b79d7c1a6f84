"""The paper's figures and table from real data, and further studies. Read `studies` first."""
