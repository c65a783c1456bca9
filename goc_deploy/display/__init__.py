"""Tables and plots for people. No other code depends on their content."""
