"""What people see of runs: tables, pictures, pages, cards."""
