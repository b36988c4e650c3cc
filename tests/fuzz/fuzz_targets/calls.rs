#![no_main]

libfuzzer_sys::fuzz_target!(init: pacs_fuzz::ignore_broken_pipes(), |bytes: &[u8]| pacs_fuzz::any_calls(bytes));
