//! Slurm host lists, as in `SLURM_JOB_NODELIST`: `login,n[1-3,07],gpu[1-2]-ib`.

/// Expands a host list in order; `None` if it is malformed.
///
/// `scontrol show hostnames` does the same, but may be missing in compute images.
pub fn hosts(list: &str) -> Option<Vec<String>> {
    let mut hosts = Vec::new();
    for part in split(list)? {
        expand(part, String::new(), &mut hosts)?;
    }
    (!hosts.is_empty()).then_some(hosts)
}

/// Bound on the hosts of a list, so that a typing error does not fill the memory.
const MOST_HOSTS: usize = 1_000_000;

/// Splits at commas outside of brackets.
fn split(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in list.char_indices() {
        match c {
            '[' if inside => return None,
            '[' => inside = true,
            ']' if !inside => return None,
            ']' => inside = false,
            ',' if !inside => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    (!inside && parts.iter().all(|part| !part.is_empty())).then_some(parts)
}

/// Appends every expansion of `rest`, each with `prefix` in front.
fn expand(rest: &str, prefix: String, hosts: &mut Vec<String>) -> Option<()> {
    let Some((plain, following)) = rest.split_once('[') else {
        hosts.push(prefix + rest);
        return (hosts.len() <= MOST_HOSTS).then_some(());
    };
    let (ranges, tail) = following.split_once(']')?;
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(first) || !digits(last) {
            return None;
        }
        let (from, to): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        if to < from || to - from >= MOST_HOSTS as u64 {
            return None;
        }
        for number in from..=to {
            // Leading zeros are part of the host name.
            expand(tail, format!("{prefix}{plain}{number:0width$}", width = first.len()), hosts)?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_expanded_in_order() {
        for (list, expected) in [
            ("n1", "n1"),
            ("n1,n2", "n1 n2"),
            ("n[1-3,7]", "n1 n2 n3 n7"),
            ("gpu[008-010]", "gpu008 gpu009 gpu010"),
            ("a,n[1,3],z-9", "a n1 n3 z-9"),
            ("r[1-2]c[1-2]-ib", "r1c1-ib r1c2-ib r2c1-ib r2c2-ib"),
        ] {
            assert_eq!(hosts(list).map(|hosts| hosts.join(" ")).as_deref(), Some(expected), "{list}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for list in ["", ",", "n[1", "n1]", "n[3-1]", "n[a-b]", "n[]", "n[1-]", "n[[1]]", "n[1-9999999999]", "n1,"] {
            assert_eq!(hosts(list), None, "{list}");
        }
    }
}
