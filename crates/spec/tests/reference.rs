//! `docs/JOB_SPEC.md` is made of the types of the spec and their documentation. `UPDATE_EXPECT=1` writes it anew.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use expect_test::expect_file;

const CRATES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Where the types of a spec are defined.
const SOURCES: [&str; 4] = ["spec/src", "algo/src", "shape/src", "types/src"];

const HEAD: &str = "\
# The job spec

A job is a TOML file. Unknown keys, values out of bounds and settings that would be ignored are refused, all of them at once,
each with its line. `pacs job init FILE` writes a file with every key; `pacs job check FILE` says what it amounts to, and
`pacs job check FILE --preflight` tries it.

This page is made of the types that read the file (`crates/spec`).
";

/// A documented item: a struct with its fields, or an enum with its variants.
struct Item {
    name: String,
    doc: String,
    is_enum: bool,
    /// Variants stand in lower case without underscores.
    lowercase: bool,
    /// Name, type (empty for variants) and documentation.
    members: Vec<(String, String, String)>,
}

/// All public items of the sources. Their names must differ: the page finds a type by its name alone.
fn items() -> Vec<Item> {
    let mut items = Vec::new();
    let mut left: Vec<_> = SOURCES.iter().map(|folder| Path::new(CRATES).join(folder)).collect();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).expect("a folder of sources");
            left.extend(entries.map(|entry| entry.expect("an entry").path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            scan(&fs::read_to_string(path).expect("a source file"), &mut items);
        }
    }
    items.sort_by(|first, second| first.name.cmp(&second.name));
    for pair in items.windows(2) {
        assert_ne!(pair[0].name, pair[1].name, "two types of one name");
    }
    items
}

fn scan(text: &str, items: &mut Vec<Item>) {
    let (mut doc, mut lowercase) = (String::new(), false);
    let mut open: Option<Item> = None;
    for line in text.lines() {
        let (indented, line) = (line.starts_with("    "), line.trim());
        if let Some(text) = line.strip_prefix("///") {
            doc.push_str(text);
        } else if line.starts_with("#[") {
            lowercase |= line.contains("rename_all = \"lowercase\"");
        } else if let Some(item) = &mut open {
            if line == "}" && !indented {
                items.extend(open.take());
            } else if let Some((name, of)) = line.strip_prefix("pub ").and_then(|field| field.split_once(": ")) {
                item.members.push((name.to_owned(), of.trim_end_matches(',').to_owned(), std::mem::take(&mut doc)));
            } else if item.is_enum && line.ends_with(',') && !line.contains(' ') {
                let name = line.trim_end_matches(',').to_owned();
                item.members.push((name, String::new(), std::mem::take(&mut doc)));
            }
        } else {
            let found = [("pub struct ", false), ("pub enum ", true)]
                .into_iter()
                .find_map(|(start, is_enum)| Some((line.strip_prefix(start)?.strip_suffix(" {")?, is_enum)));
            if let Some((name, is_enum)) = found {
                let (name, doc) = (name.to_owned(), std::mem::take(&mut doc));
                open = Some(Item { name, doc, is_enum, lowercase, members: Vec::new() });
            }
            doc.clear();
            lowercase = false;
        }
    }
}

/// `SeqMeanTokenSum` as it stands in a file: `seq_mean_token_sum`.
fn variant(name: &str, lowercase: bool) -> String {
    let mut text = String::new();
    for (position, letter) in name.char_indices() {
        if letter.is_ascii_uppercase() && position > 0 && !lowercase {
            text.push('_');
        }
        text.push(letter.to_ascii_lowercase());
    }
    text
}

/// Adds the table of `item` at `path`, then those within it.
fn table(page: &mut String, items: &[Item], item: &Item, path: &str) {
    if path.is_empty() {
        page.push_str("\n## Top of the file\n\n");
    } else {
        let _ = write!(page, "\n## `[{path}]`\n\n{}\n\n", item.doc.trim());
    }
    let mut within = Vec::new();
    for (key, of, doc) in &item.members {
        let of = of.strip_prefix("Option<").and_then(|of| of.strip_suffix('>')).unwrap_or(of);
        let here = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let value = of.strip_prefix("BTreeMap<String, ").and_then(|of| of.strip_suffix('>'));
        let known = items.iter().find(|item| item.name == value.unwrap_or(of));
        let (kind, values) = match (of, known) {
            (_, Some(known)) if !known.is_enum => {
                within.push((known, if value.is_some() { format!("{here}.NAME") } else { here }));
                continue;
            }
            (_, Some(known)) => ("one of", Some(known)),
            ("u32" | "u64" | "usize", None) => ("integer", None),
            ("f64", None) => ("number", None),
            ("bool", None) => ("true or false", None),
            ("String" | "PathBuf", None) => ("text", None),
            ("Vec<String>" | "Vec<PathBuf>", None) => ("list of texts", None),
            ("toml::Table" | "Table", None) => ("table", None),
            ("BTreeMap<String, String>", None) => ("table of texts", None),
            (other, None) => panic!("[{path}] {key}: what is a {other}?"),
        };
        let _ =
            writeln!(page, "- **`{key}`** ({kind}{}):{doc}", if values.is_some() { " the values below" } else { "" });
        for (name, _, doc) in values.map(|values| &values.members).into_iter().flatten() {
            let lowercase = values.is_some_and(|values| values.lowercase);
            let _ = writeln!(page, "  - `\"{}\"`:{doc}", variant(name, lowercase));
        }
    }
    for (item, path) in within {
        table(page, items, item, &path);
    }
}

#[test]
fn the_reference_is_that_of_the_types() {
    let items = items();
    let mut page = HEAD.to_owned();
    let job = items.iter().find(|item| item.name == "JobSpec").unwrap();
    table(&mut page, &items, job, "");
    // What the page says is what is read: every key of the template stands there.
    let template: toml::Table = toml::from_str(&pacs_spec::init_template()).unwrap();
    for (name, value) in &template {
        assert!(page.contains(&format!("`{name}`")) || page.contains(&format!("`[{name}]`")), "{name}");
        for key in value.as_table().into_iter().flat_map(toml::Table::keys) {
            let stands = page.contains(&format!("**`{key}`**")) || page.contains(&format!("`[{name}.{key}]`"));
            assert!(stands, "{name}.{key}");
        }
    }
    expect_file!["../../../docs/JOB_SPEC.md"].assert_eq(&page);
}
