"""The paper's figures and table from real data, and further studies: `studies` first."""
