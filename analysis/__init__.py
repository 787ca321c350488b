"""Tables, figures and the report, from exported Parquet alone."""
