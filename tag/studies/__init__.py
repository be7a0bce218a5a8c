"""The paper's tables and Figure 5: which runs they need, how these are made, what they say."""
