//! The modules of the crate import each other one way only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Result;
use std::path::Path;

/// Returns the modules that each module names in its code, tests included.
fn imports() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut sources = BTreeMap::new();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        // `lib.rs` is the root: it names every module and nothing imports it.
        if name != "lib" {
            sources.insert(name.into_owned(), fs::read_to_string(&path)?);
        }
    }
    let named = |source: &str| -> BTreeSet<String> {
        source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .flat_map(|line| line.split("crate::").skip(1))
            .map(|path| path.split(|end: char| !end.is_alphanumeric() && end != '_'))
            .filter_map(|mut words| words.next().map(ToOwned::to_owned))
            .collect()
    };
    Ok(sources
        .iter()
        .map(|(name, source)| (name.clone(), named(source)))
        .collect())
}

#[test]
fn no_modules_import_each_other_in_a_circle() -> Result<()> {
    let mut left = imports()?;
    // The reader sees the imports.
    assert!(left["forest"].contains("probe"));
    let modules: BTreeSet<String> = left.keys().cloned().collect();
    for (name, named) in &left {
        assert!(named.is_subset(&modules), "{name} imports {named:?}");
    }
    while !left.is_empty() {
        let before = left.len();
        let waiting: BTreeSet<String> = left.keys().cloned().collect();
        left.retain(|_, named| !named.is_disjoint(&waiting));
        assert!(left.len() < before, "in a circle, or above one: {left:?}");
    }
    Ok(())
}
