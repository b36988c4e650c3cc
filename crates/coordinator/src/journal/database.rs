//! The SQLite database of records and snapshot.

use std::path::{Path, PathBuf};

use pacs_machine::Machine;
use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::{Audit, Extras, Records, Snapshot};
use crate::FileError;

/// Version of the tables and their content; a journal of another version is not read.
const FORMAT: &str = "3";

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (seq INTEGER PRIMARY KEY, record TEXT NOT NULL, payload BLOB);
CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, machine TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS extras (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audit (at INTEGER NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL);
";

/// One record to be written.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) seq: u64,
    pub(super) record: String,
    pub(super) payload: Option<Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct Database {
    path: PathBuf,
    connection: Connection,
}

impl Database {
    fn path(folder: &Path) -> PathBuf {
        folder.join("journal.db")
    }

    pub(super) fn exists(folder: &Path) -> bool {
        Self::path(folder).exists()
    }

    pub(super) fn open(folder: &Path) -> Result<Self, FileError> {
        let path = Self::path(folder);
        let open = || {
            let connection = Connection::open(&path)?;
            // Exclusive locking keeps the index of the log in this process's memory. A shared one would need mapped
            // memory, which network file systems do not have.
            connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            // Every commit is on disk when it returns.
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.execute_batch(SCHEMA)?;
            Ok(connection)
        };
        let connection = open().map_err(FileError::database("open", &path))?;
        Ok(Self { path, connection })
    }

    /// Stores the format, the program version and the job spec of this journal.
    pub(super) fn describe(&self, spec: &str) -> Result<(), FileError> {
        for (key, value) in [("format", FORMAT), ("version", env!("CARGO_PKG_VERSION")), ("spec", spec)] {
            let sql = "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = ?2";
            self.connection.execute(sql, params![key, value]).map_err(FileError::database("write", &self.path))?;
        }
        Ok(())
    }

    /// Why this program cannot resume from the journal; `None` if it can.
    pub(super) fn difference(&self, spec: &str) -> Result<Option<String>, FileError> {
        for (key, ours, what) in [
            ("format", FORMAT, "it has another format"),
            ("version", env!("CARGO_PKG_VERSION"), "another version of the program wrote it"),
            ("spec", spec, "the job spec has changed"),
        ] {
            let sql = "SELECT value FROM meta WHERE key = ?1";
            let found = self.connection.query_row(sql, [key], |row| row.get::<_, String>(0)).optional();
            if found.map_err(FileError::database("read", &self.path))?.is_none_or(|theirs| theirs != ours) {
                return Ok(Some(what.to_owned()));
            }
        }
        Ok(None)
    }

    /// The snapshot of the machine, with the driver's extra state.
    pub(super) fn snapshot(&self) -> Result<Option<(Machine, Extras)>, FileError> {
        let read = || {
            let sql = "SELECT machine FROM snapshot WHERE id = 1";
            let machine = self.connection.query_row(sql, [], |row| row.get::<_, String>(0)).optional()?;
            let mut statement = self.connection.prepare("SELECT key, value FROM extras")?;
            let extras = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok((machine, extras.collect::<Result<Vec<_>, _>>()?))
        };
        let (machine, extras) = read().map_err(FileError::database("read", &self.path))?;
        let Some(machine) = machine else { return Ok(None) };
        let machine = serde_json::from_str(&machine).map_err(|error| self.damaged("the snapshot", &error))?;
        Ok(Some((machine, extras)))
    }

    /// The records after the snapshot, in order.
    pub(super) fn records(&self) -> Result<Records, FileError> {
        let failed = |error| FileError::database("read", &self.path)(error);
        let sql = "SELECT seq, record, payload FROM records ORDER BY seq";
        let mut statement = self.connection.prepare(sql).map_err(failed)?;
        let mut rows = statement.query([]).map_err(failed)?;
        let mut records = Vec::new();
        while let Some(row) = rows.next().map_err(failed)? {
            let seq: u64 = row.get(0).map_err(failed)?;
            let text = row.get_ref(1).and_then(|value| value.as_str().map_err(Into::into)).map_err(failed)?;
            let record = serde_json::from_str(text).map_err(|error| self.damaged(&format!("record {seq}"), &error))?;
            records.push((record, row.get(2).map_err(failed)?));
        }
        Ok(records)
    }

    fn damaged(&self, what: &str, error: &serde_json::Error) -> FileError {
        FileError::damaged(&self.path, format!("{what} cannot be read: {error}"))
    }

    /// Number of the newest record; 0 for an empty journal.
    pub(super) fn newest(&self) -> Result<u64, FileError> {
        let sql = "SELECT max(ifnull((SELECT max(seq) FROM records), 0), ifnull((SELECT seq FROM snapshot), 0))";
        self.connection.query_row(sql, [], |row| row.get(0)).map_err(FileError::database("read", &self.path))
    }

    /// Writes rows, audit entries and snapshot in one transaction, whose commit makes them durable.
    pub(super) fn write(
        &mut self,
        rows: &[Row],
        audits: &[Audit],
        snapshot: Option<&(u64, Snapshot)>,
    ) -> rusqlite::Result<Transaction<'_>> {
        let transaction = self.connection.transaction()?;
        {
            let mut insert =
                transaction.prepare_cached("INSERT INTO records (seq, record, payload) VALUES (?, ?, ?)")?;
            let covered = snapshot.map_or(0, |(seq, _)| *seq);
            for row in rows.iter().filter(|row| row.seq > covered) {
                insert.execute(params![row.seq, row.record, row.payload])?;
            }
            let mut insert = transaction.prepare_cached("INSERT INTO audit (at, who, what) VALUES (?, ?, ?)")?;
            for audit in audits {
                insert.execute(params![audit.at, audit.who, audit.what])?;
            }
        }
        if let Some((seq, snapshot)) = snapshot {
            transaction.execute("DELETE FROM records WHERE seq <= ?", [seq])?;
            transaction.execute("DELETE FROM extras", [])?;
            transaction.execute(
                "INSERT OR REPLACE INTO snapshot (id, seq, machine) VALUES (1, ?, ?)",
                params![seq, snapshot.machine],
            )?;
            for (key, value) in &snapshot.extras {
                transaction.execute("INSERT INTO extras (key, value) VALUES (?, ?)", params![key, value])?;
            }
        }
        Ok(transaction)
    }
}
