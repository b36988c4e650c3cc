#![no_main]

libfuzzer_sys::fuzz_target!(init: pacs_fuzz::ignore_broken_pipes(), |bytes: &[u8]| pacs_fuzz::run_folder::check(bytes));
