use std::fmt::{Display, Formatter};

/// A Markdown table. The first column is left-aligned; the others hold numbers and are right-aligned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Creates a table with column titles and no rows.
    #[must_use]
    pub fn new<T: Display>(titles: impl IntoIterator<Item = T>) -> Self {
        Self { rows: vec![cells(titles)] }
    }

    /// Adds a row. Surplus cells are dropped, missing ones are empty.
    pub fn row<T: Display>(&mut self, row: impl IntoIterator<Item = T>) {
        let mut row = cells(row);
        row.resize(self.rows[0].len(), String::new());
        self.rows.push(row);
    }
}

fn cells<T: Display>(row: impl IntoIterator<Item = T>) -> Vec<String> {
    // A bar would end the cell, and a line break the row.
    row.into_iter().map(|cell| cell.to_string().replace('|', "\\|").replace(['\n', '\r'], " ")).collect()
}

impl Display for Table {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column == 0 { write!(out, "| {cell:<width$} ")? } else { write!(out, "| {cell:>width$} ")? }
            }
            writeln!(out, "|")?;
            if index == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let dashes = "-".repeat(width - 1);
                    if column == 0 { write!(out, "| {dashes}- ")? } else { write!(out, "| {dashes}: ")? }
                }
                writeln!(out, "|")?;
            }
        }
        Ok(())
    }
}
