//! What a version is called on a server: `weight_version` there is any text.

use pacs_weights::{Description, VersionId};

/// Digits of a run's id and of a version's digest that a label has.
const DIGITS: usize = 16;

/// The label of a version: run, generation, version and digest, so that equal labels are equal weights.
pub(crate) fn of_version(run: &str, description: &Description) -> String {
    let VersionId { generation, version } = description.id();
    let digest: String = description.digest()[..DIGITS / 2].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}:{}:{}:{digest}", of_run(run), generation.0, version.0)
}

/// The label while weights are replaced: tokens that are generated all the same are of unknown weights.
pub(crate) fn of_update(run: &str) -> String {
    format!("{}:updating", of_run(run))
}

/// The label of a version that a server has loaded and that was not verified there yet. Only what is verified gets the label of the
/// version, so that a worker that starts again knows which servers it may use as they are.
pub(crate) fn unverified(label: &str) -> String {
    format!("{label}:unverified")
}

fn of_run(run: &str) -> String {
    format!("pacs:{}", run.get(..DIGITS).unwrap_or(run))
}

/// Whether a label was set by a run. A server that was started anew has one of its own.
pub(crate) fn is_of_a_run(label: &str) -> bool {
    label.starts_with("pacs:")
}

/// Whether a label is of another run, which then changes the weights of this server, too.
pub(crate) fn is_of_another_run(run: &str, label: &str) -> bool {
    is_of_a_run(label) && !label.starts_with(&format!("{}:", of_run(run)))
}

#[cfg(test)]
mod tests {
    use pacs_weights::WeightKind;

    use super::*;

    #[test]
    fn labels_name_run_version_and_content() {
        let of = |version, content: &[u8]| Description::of(VersionId::new(2, version), WeightKind::Float32, content);
        let run = "0123456789abcdef0123456789abcdef";
        let label = of_version(run, &of(7, &[1, 2, 3, 4]));
        assert!(label.starts_with("pacs:0123456789abcdef:2:7:"), "{label}");
        assert_ne!(label, of_version(run, &of(7, &[1, 2, 3, 5])));
        assert!(!is_of_another_run(run, &label) && !is_of_another_run(run, &of_update(run)));
        assert!(!is_of_another_run(run, "default"));
        assert!(is_of_another_run("ffff", &label));
        assert!(is_of_a_run(&label) && !is_of_a_run("default"));
    }
}
