"""What a person looks at: charts, the thread viewer, the pages."""
