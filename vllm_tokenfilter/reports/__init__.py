"""Tables, plots and pages made from result files; nothing here measures anything."""
