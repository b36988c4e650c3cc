//! The files of the page, compiled into the program.

/// A file of the page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asset {
    pub(crate) path: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) bytes: &'static [u8],
}

macro_rules! assets {
    ($($path:literal $file:literal $kind:expr;)*) => {
        pub(crate) const ALL: &[Asset] = &[$(Asset {
            path: $path,
            kind: $kind,
            bytes: include_bytes!(concat!("../assets/", $file)),
        }),*];
    };
}

const JS: &str = "text/javascript; charset=utf-8";

assets! {
    "/" "index.html" "text/html; charset=utf-8";
    "/style.css" "style.css" "text/css; charset=utf-8";
    "/icon.svg" "icon.svg" "image/svg+xml";
    "/app.js" "app.js" JS;
    "/chart.js" "chart.js" JS;
    "/curves.js" "curves.js" JS;
    "/dom.js" "dom.js" JS;
    "/maths.js" "maths.js" JS;
    "/samples.js" "samples.js" JS;
    "/timeline.js" "timeline.js" JS;
    "/workers.js" "workers.js" JS;
}

/// The file at this path of a URL.
pub(crate) fn find(path: &str) -> Option<&'static Asset> {
    ALL.iter().find(|asset| asset.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bound on the page, in bytes.
    const MOST_BYTES: usize = 500_000;

    #[test]
    fn the_page_is_small_and_names_no_other_host() {
        assert!(ALL.iter().map(|asset| asset.bytes.len()).sum::<usize>() < MOST_BYTES);
        for asset in ALL {
            let text = std::str::from_utf8(asset.bytes).unwrap();
            // Names of XML namespaces are no addresses.
            let text = text.replace("http://www.w3.org/", "");
            assert!(!text.contains("http://") && !text.contains("https://"), "{}", asset.path);
            for unsafe_call in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"]
            {
                assert!(!text.contains(unsafe_call), "{} uses {unsafe_call}", asset.path);
            }
        }
    }

    #[test]
    fn every_module_that_is_imported_is_served() {
        for asset in ALL.iter().filter(|asset| asset.kind == JS) {
            let text = std::str::from_utf8(asset.bytes).unwrap();
            for line in text.lines().filter(|line| line.starts_with("import ")) {
                let name = line.rsplit('"').nth(1).unwrap_or_default();
                let path = name.strip_prefix('.').unwrap_or(name);
                assert!(find(path).is_some(), "{} imports {name}", asset.path);
            }
        }
    }
}
